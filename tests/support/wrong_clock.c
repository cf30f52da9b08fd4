/* A machine whose clock is wrong: preloaded (LD_PRELOAD), it shifts every reading of the wall clock by WRONG_CLOCK
   seconds, or, where WRONG_CLOCK_FILE names a file, by as many as stand in it by then (0 while it is not there). The
   monotonic clock, which measures durations, stays what it is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long shift(void) {
    const char *file = getenv("WRONG_CLOCK_FILE");
    if (file) {
        char text[32] = "";
        int from = open(file, O_RDONLY | O_CLOEXEC);
        if (from < 0) return 0;
        ssize_t length = read(from, text, sizeof text - 1);
        close(from);
        return length > 0 ? atol(text) : 0;
    }
    const char *seconds = getenv("WRONG_CLOCK");
    return seconds ? atol(seconds) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int status = real(now, zone);
    if (status == 0) now->tv_sec += shift();
    return status;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
