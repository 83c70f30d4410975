/* Included before every source file (setup.py), before any header of the C library: its checks of buffer sizes,
 * as strong as the compiler can have them. They need an optimiser, and wrap what the address sanitizer watches. */
#undef _FORTIFY_SOURCE
#if defined __OPTIMIZE__ && !defined __SANITIZE_ADDRESS__
#if __GNUC__ >= 12 || __clang_major__ >= 9
#define _FORTIFY_SOURCE 3
#else
#define _FORTIFY_SOURCE 2
#endif
#endif
