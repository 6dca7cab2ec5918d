# Only files named *_<isa>.cpp may use instructions beyond the architecture's baseline; their callers ask
# cpu_features.h first, which tests for every extension that these flags enable.
set(MPOE_FLAGS_avx2 -march=x86-64-v3)
set(MPOE_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
set(MPOE_FLAGS_avx512bf16 -march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512)
set(MPOE_FLAGS_amx ${MPOE_FLAGS_avx512bf16} -mamx-tile -mamx-bf16)

# Sets the flags of the files in a list variable; removes files for another architecture from it.
function(mpoe_apply_isa_flags LIST_NAME)
  set(kept ${${LIST_NAME}})
  foreach(source IN LISTS kept)
    string(REGEX MATCH "_(avx2|avx512|avx512bf16|amx)\\.cpp$" matched "${source}")
    if(matched)
      set(isa "${CMAKE_MATCH_1}")
      if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
        set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${MPOE_FLAGS_${isa}}")
      else()
        list(REMOVE_ITEM kept "${source}")
      endif()
    endif()
  endforeach()
  set(${LIST_NAME} ${kept} PARENT_SCOPE)
endfunction()
