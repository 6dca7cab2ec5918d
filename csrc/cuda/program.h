// How a linear contracts, read from its text: csrc/cuda/linear.h describes the language.
#pragma once
#include <string>
#include <vector>

#include "cuda/few.h"
#include "cuda/named.h"
#include "cuda/panel.h"

namespace mpoe::cuda {

using Names = std::vector<std::string>;

struct Merge {
  std::string result, first, second;
};
struct Program {
  std::vector<Merge> merges;  // in this order, once per expert
  Names order;                // what x meets
  bool in_panels = false;     // rows meet W in shared memory
  PanelShape panel;
  bool in_one_launch = false;  // rows meet left, central and right in one kernel
  FewShape few;
};

// Throws std::invalid_argument for a text that does not apply left, central and right once each.
Program parse(const std::string& text);

// Whether the rows after the central step are [jC, b]: those that a separable shape's forward saves.
inline bool keeps_h(const Program& program, const Dims& dims) {
  return program.order == Names{"L", "C", "R"} && dims.size[kJL] == 1 && dims.size[kIR] == 1;
}

}  // namespace mpoe::cuda
