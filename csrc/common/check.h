// One error format for every kernel: "<op>: <what must hold>, got <what came>".
// std::invalid_argument reaches Python as ValueError, std::out_of_range as IndexError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace vidmem {

template <class Error = std::invalid_argument, class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << args);
  throw Error(message.str());
}

}  // namespace vidmem

#define VIDMEM_CHECK(condition, op, ...)        \
  do {                                          \
    if (!(condition)) {                         \
      ::vidmem::fail(op, __VA_ARGS__);          \
    }                                           \
  } while (false)
