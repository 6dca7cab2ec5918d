// How functions of the C interface refuse a call: a check that fails ends the call with kBadValue and a message.
#pragma once

#include <cstdint>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/types.h"
#include "cpu/gemm/gemm.h"
#include "cpu/router/router.h"
#include "interface.h"

namespace mpoe {

struct Refusal {
  std::string text;
};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Refusal{text.str()};
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) refuse(parts...);
}

// Sets what mpoe_message() returns on the calling thread.
void set_message(std::string text);

// Runs the body of an interface function: no exception leaves the library.
template <class Body>
int answered(Body&& body) {
  try {
    std::forward<Body>(body)();
    return kDone;
  } catch (Refusal& refusal) {
    set_message(std::move(refusal.text));
    return kBadValue;
  } catch (const std::bad_alloc&) {
    set_message("the native kernels got no memory for what they compute with");
    return kNoMemory;
  }
}

// Checks a router's call; mpoe_routed_hidden_experts starts with one too.
Gating checked_gating(const MpoeRouter& call);

Dtype dtype_named(const char* name);
Activation activation_named(const char* name);

// Slots and tokens become addresses: a wrong one must not be dereferenced.
void require_range(const std::int64_t* values, std::int64_t count, std::int64_t low, std::int64_t high, const char* name);

// The expert_offsets of a call as int64: [experts + 1], starting at 0, non-decreasing, at most `slots`.
std::vector<std::int64_t> checked_offsets(
    const void* offsets, std::int64_t offset_bytes, std::int64_t experts, std::int64_t slots);

}  // namespace mpoe
