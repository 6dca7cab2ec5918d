# The CUDA kernels: mpoe_kernels/_C_cuda.abi3.so, a separate module, so that the CPU module loads without CUDA.
# Architectures: CMAKE_CUDA_ARCHITECTURES, e.g. "90a-real;100-virtual": machine code for sm_90a and PTX for sm_100.
set(MPOE_TORCH_DIR "" CACHE PATH "folder of the installed torch package")
set(MPOE_TORCH_VERSION "unknown" CACHE STRING "version of the torch it is built against")
if(NOT EXISTS "${MPOE_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "MPOE_TORCH_DIR=${MPOE_TORCH_DIR} holds no torch with stable C++ headers (torch >= 2.11)")
endif()
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100-real 100-virtual)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS
  "${CMAKE_CURRENT_LIST_DIR}/*.cpp" "${CMAKE_CURRENT_LIST_DIR}/*/*.cpp" "${CMAKE_CURRENT_LIST_DIR}/*/*.cu")
list(SORT CUDA_SOURCES)
# The bindings include headers with device code.
set_source_files_properties(${CUDA_SOURCES} PROPERTIES LANGUAGE CUDA)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " ARCHITECTURES)
set_source_files_properties("${CMAKE_CURRENT_LIST_DIR}/build_info.cpp" PROPERTIES COMPILE_DEFINITIONS
  "MPOE_VERSION=\"${MPOE_VERSION}\";MPOE_TORCH_VERSION=\"${MPOE_TORCH_VERSION}\";MPOE_CUDA_ARCHITECTURES=\"${ARCHITECTURES}\"")

add_library(_C_cuda MODULE ${CUDA_SOURCES})
target_include_directories(_C_cuda PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
target_include_directories(_C_cuda SYSTEM PRIVATE "${MPOE_TORCH_DIR}/include")
# 2.11 is the oldest torch that loads the result; with STABLE_ONLY any use of the unstable C++ API is a compile error.
target_compile_definitions(_C_cuda PRIVATE USE_CUDA TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY)
target_compile_options(_C_cuda PRIVATE -lineinfo -Xcompiler=-Wall,-Wextra -Xptxas=-warn-spills,-warn-lmem-usage)
if(MPOE_WARNINGS_AS_ERRORS)
  target_compile_options(_C_cuda PRIVATE -Werror=all-warnings)
endif()
target_link_libraries(_C_cuda PRIVATE
  "${MPOE_TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}" CUDA::cudart_static)
if(EXISTS "${MPOE_TORCH_DIR}/lib/libtorch_cuda.so")
  target_link_libraries(_C_cuda PRIVATE "${MPOE_TORCH_DIR}/lib/libtorch_cuda.so")
else()
  # A torch without CUDA: linking to a library of the same name, with the one function that we use, makes the result
  # load the real one at run time.
  file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda.cpp"
    "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
  add_library(torch_cuda SHARED "${CMAKE_BINARY_DIR}/torch_cuda.cpp")
  set_target_properties(torch_cuda PROPERTIES CXX_VISIBILITY_PRESET default)
  target_link_libraries(_C_cuda PRIVATE torch_cuda)
endif()
set_target_properties(_C_cuda PROPERTIES PREFIX "" SUFFIX ".abi3.so" SKIP_BUILD_RPATH ON
  CUDA_VISIBILITY_PRESET hidden)
