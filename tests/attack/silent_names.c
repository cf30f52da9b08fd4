/* A name server that says nothing, and one that changes its mind: preloaded (LD_PRELOAD), names below `.silent.test`
   take SILENCE seconds to be found unknown, and those below `.rebind.test` resolve to 127.0.0.3 and 127.0.0.1 in turn. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#define SILENCE 10

static int below(const char *name, const char *zone) {
    size_t n = name ? strlen(name) : 0, z = strlen(zone);
    return n > z && strcmp(name + n - z, zone) == 0;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    static atomic_uint asked;
    if (!real) real = (int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(RTLD_NEXT, "getaddrinfo");
    if (below(node, ".silent.test")) {
        sleep(SILENCE);
        return EAI_AGAIN;
    }
    if (below(node, ".rebind.test")) node = asked++ % 2 ? "127.0.0.1" : "127.0.0.3";
    return real(node, service, hints, found);
}
