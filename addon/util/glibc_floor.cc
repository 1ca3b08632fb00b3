// SPDX-License-Identifier: Apache-2.0
// Lets a binary that was linked on a newer glibc load on glibc 2.28 (RHEL 8, Debian 10).
//
// Two kinds of symbols would raise that floor. What moved into libc.so with glibc 2.32 to 2.34 got a new version
// and is otherwise the same function: it is bound to its first version here. What did not exist in 2.28 is
// defined here by its system call. The definitions are hidden: nobody else in the process sees them, but the
// static libstdc++ is linked against them too. `npm run prebuild` fails on whatever this file has missed.

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#include <features.h>
#endif

#ifdef __GLIBC__

#include <cstdint>
#include <cstdlib>

#include <pthread.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __x86_64__
#define TCMU_FIRST_VERSION "GLIBC_2.2.5"
#define TCMU_SETNAME_VERSION "GLIBC_2.12"
#else
#define TCMU_FIRST_VERSION "GLIBC_2.17"
#define TCMU_SETNAME_VERSION "GLIBC_2.17"
#endif

#define TCMU_HIDDEN __attribute__((visibility("hidden")))
// `first_NAME` is NAME as glibc had it in VERSION.
#define TCMU_BIND(name, version) __asm__(".symver first_" #name "," #name "@" version)

TCMU_BIND(pthread_create, TCMU_FIRST_VERSION);
TCMU_BIND(pthread_detach, TCMU_FIRST_VERSION);
TCMU_BIND(pthread_join, TCMU_FIRST_VERSION);
TCMU_BIND(pthread_once, TCMU_FIRST_VERSION);
TCMU_BIND(pthread_sigmask, TCMU_FIRST_VERSION);
TCMU_BIND(pthread_setname_np, TCMU_SETNAME_VERSION);
TCMU_BIND(__pthread_key_create, TCMU_FIRST_VERSION);

struct stat;

extern "C" {

int first_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int first_pthread_detach(pthread_t);
int first_pthread_join(pthread_t, void**);
int first_pthread_once(pthread_once_t*, void (*)());
int first_pthread_sigmask(int, const sigset_t*, sigset_t*);
int first_pthread_setname_np(pthread_t, const char*);
int first___pthread_key_create(pthread_key_t*, void (*)(void*));

TCMU_HIDDEN int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                               void* (*start)(void*), void* argument) noexcept {
  return first_pthread_create(thread, attributes, start, argument);
}
TCMU_HIDDEN int pthread_detach(pthread_t thread) noexcept { return first_pthread_detach(thread); }
TCMU_HIDDEN int pthread_join(pthread_t thread, void** result) {
  return first_pthread_join(thread, result);
}
TCMU_HIDDEN int pthread_once(pthread_once_t* control, void (*routine)()) {
  return first_pthread_once(control, routine);
}
TCMU_HIDDEN int pthread_sigmask(int how, const sigset_t* set, sigset_t* old) noexcept {
  return first_pthread_sigmask(how, set, old);
}
TCMU_HIDDEN int pthread_setname_np(pthread_t thread, const char* name) noexcept {
  return first_pthread_setname_np(thread, name);
}
TCMU_HIDDEN int __pthread_key_create(pthread_key_t* key, void (*destructor)(void*)) noexcept {
  return first___pthread_key_create(key, destructor);
}

// glibc 2.30.
TCMU_HIDDEN pid_t gettid() noexcept { return static_cast<pid_t>(syscall(SYS_gettid)); }

// glibc 2.33; the inline of older headers called another symbol. struct stat is the kernel's on both machines.
TCMU_HIDDEN int fstat64(int fd, struct stat64* facts) noexcept {
  return static_cast<int>(syscall(SYS_fstat, fd, facts));
}

// glibc 2.36; libstdc++'s random_device was built to use it.
TCMU_HIDDEN uint32_t arc4random() noexcept {
  uint32_t value;
  if (getentropy(&value, sizeof value) != 0) abort();
  return value;
}

// glibc 2.32: whether counters may be plain instead of atomic. In Node there are always threads.
TCMU_HIDDEN extern char __libc_single_threaded;
char __libc_single_threaded = 0;

}  // extern "C"

#endif
