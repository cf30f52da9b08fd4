# Included by llama-cpp-python's build right after its project() call. Its CMakeLists.txt forces llama.cpp's `common`
# library on through the cache; a plain variable set earlier shadows the cache (CMake policy CMP0126), so `common`, which
# only llama.cpp's own programs link, is left out: two thirds of the compile time, and nothing the Python package loads.
set(LLAMA_BUILD_COMMON OFF)
