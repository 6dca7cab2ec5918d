#include "cuda/program.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace mpoe::cuda {

Program parse(const std::string& text) {
  Program program;
  std::istringstream words(text);
  std::string word;
  bool building = true;
  std::string half;
  while (words >> word) {
    if (word == "panel") {
      program.in_panels = true;
      words >> program.panel.left >> program.panel.centre >> program.panel.right;
    } else if (word == "few") {
      program.in_one_launch = true;
      words >> program.few.left >> program.few.centre >> program.few.right >> program.few.rows;
    } else if (word == "|") {
      building = false;
    } else if (!building) {
      layout_of(word);
      program.order.push_back(word);
    } else if (word == "LC" || word == "CR") {
      half = word;
      program.merges.push_back({word, word.substr(0, 1), word.substr(1)});
    } else if (word == "W" && !half.empty()) {
      program.merges.push_back(half == "LC" ? Merge{"W", "LC", "R"} : Merge{"W", "L", "CR"});
    } else {
      throw std::invalid_argument("program '" + text + "' builds '" + word + "' from nothing");
    }
  }
  // Together, what x meets must hold every axis of the weight once, and x's own.
  Names blocks;
  for (const auto& name : program.order) {
    for (const char part : name == "W" ? std::string("LCR") : name) blocks.push_back(std::string(1, part));
  }
  std::sort(blocks.begin(), blocks.end());
  if (building || blocks != Names{"C", "L", "R"}) {
    throw std::invalid_argument("program '" + text + "' must apply left, central and right once each");
  }
  for (const auto& name : program.order) {
    bool known = name.size() == 1 && name != "W";
    for (const auto& merge : program.merges) known = known || merge.result == name;
    if (!known) throw std::invalid_argument("program '" + text + "' applies '" + name + "' without building it");
  }
  program.panel.left_first = half == "LC";
  if (program.in_panels && program.order != Names{"W"}) {
    throw std::invalid_argument("program '" + text + "' must apply W: panels hold whole weights");
  }
  if (program.in_one_launch && program.order != Names{"L", "C", "R"}) {
    throw std::invalid_argument("program '" + text + "' must apply left, central and right in this order");
  }
  return program;
}

}  // namespace mpoe::cuda
