// What every launch is followed by.
#pragma once

namespace mpoe::cuda {

// Throws if the preceding launch failed.
void check_launch(const char* what);

}  // namespace mpoe::cuda
