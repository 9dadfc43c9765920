/* How a process ends. PyTorch's autograd thread needs the interpreter once more after backward() has returned. Where
 * the process is exiting by then, Python before 3.14 ends that thread by pthread_exit, whose unwinding meets C++ that
 * must not throw: "terminate called without an active exception". It can happen on any GPU and is likelier on one whose
 * kernels take no time. So such a thread is made to wait for the end, as Python 3.14 does itself (gh-87135). */
#include <dlfcn.h>
#include <unistd.h>

#include "gpu.h"

static int python_is_ending(void) {
  int (*ending)(void) = dlsym(RTLD_DEFAULT, "Py_IsFinalizing");         /* since Python 3.13 */
  if (!ending) ending = dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");        /* before */
  return ending && ending();
}

API __attribute__((noreturn)) void pthread_exit(void *value) {
  while (python_is_ending()) pause();
  void (*next)(void *) __attribute__((noreturn)) = dlsym(RTLD_NEXT, "pthread_exit");
  next(value);
}
