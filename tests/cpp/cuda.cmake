# The CUDA kernels, compiled as C++ for the emulator, and the program fae_cuda_tests that runs them.
# Apart from fae_tests: a cross build or a sanitizer has enough to do without it.
#
# Which instances there are, build_tools/cuda.py says: name, file and definitions of each.
set(FAE_ROOT ${CMAKE_CURRENT_LIST_DIR}/../..)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${FAE_ROOT}/build_tools/cuda.py)
find_package(Python3 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c "from build_tools import cuda
print(';'.join(' '.join([i.name, i.source, *i.defines]) for i in cuda.instances()))"
  WORKING_DIRECTORY ${FAE_ROOT}
  OUTPUT_VARIABLE FAE_CUDA_INSTANCES
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE FAE_CUDA_FAILED)
if(FAE_CUDA_FAILED)
  message(FATAL_ERROR "build_tools/cuda.py did not list the CUDA kernels")
endif()

# The library of the emulated backend is made of the same objects (build_tools/emulated.py): no need to
# compile them twice where it has been built.
set(FAE_KERNEL_OBJECTS "" CACHE PATH "Folder of the kernels' objects; empty: they are compiled here")

# Under this project's languages a .cu file is C++: the kernels' own switch is __CUDACC__.
file(GLOB FAE_CUDA_HOST CONFIGURE_DEPENDS ${FAE_SOURCES}/cuda/launch/*.cpp)

function(fae_add_cuda_objects name)
  add_library(${name} OBJECT ${ARGN})
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  target_include_directories(${name} PRIVATE ${FAE_SOURCES})
  # Their loop pragmas are nvcc's.
  target_compile_options(${name} PRIVATE -Wall -Wextra -Wno-unknown-pragmas -O2)
  set_target_properties(${name} PROPERTIES CXX_STANDARD 20 EXCLUDE_FROM_ALL ON)
endfunction()

fae_add_cuda_objects(fae_cuda_host ${FAE_CUDA_HOST})
set(FAE_CUDA_SUPPORT $<TARGET_OBJECTS:fae_cuda_host>)
set(FAE_CUDA_KERNELS "")
foreach(instance ${FAE_CUDA_INSTANCES})
  separate_arguments(parts UNIX_COMMAND ${instance})
  list(POP_FRONT parts name file)
  if(parts AND FAE_KERNEL_OBJECTS)
    list(APPEND FAE_CUDA_KERNELS ${FAE_KERNEL_OBJECTS}/${name}.o)
    continue()
  endif()
  fae_add_cuda_objects(fae_cuda_${name} ${FAE_SOURCES}/cuda/inst/${file}.cu)
  target_compile_options(fae_cuda_${name} PRIVATE ${parts})
  if(parts)
    list(APPEND FAE_CUDA_KERNELS $<TARGET_OBJECTS:fae_cuda_${name}>)
  else()
    list(APPEND FAE_CUDA_SUPPORT $<TARGET_OBJECTS:fae_cuda_${name}>)
  endif()
endforeach()

# All but kernels: tests/test_cuda_mutations.py brings its own.
add_library(fae_cuda_support STATIC EXCLUDE_FROM_ALL cuda_case.cpp attention_case.cpp ${FAE_CUDA_SUPPORT})
target_compile_options(fae_cuda_support PRIVATE -Wall -Wextra -O1)
set_target_properties(fae_cuda_support PROPERTIES CXX_STANDARD 20)
target_link_libraries(fae_cuda_support PUBLIC fae_cpu fae_emulator)

if(FAE_KERNEL_OBJECTS)
  set_source_files_properties(${FAE_CUDA_KERNELS} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
endif()
file(GLOB FAE_CUDA_TESTS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/cuda_*_test.cpp)
add_executable(fae_cuda_tests EXCLUDE_FROM_ALL ${FAE_CUDA_TESTS} ${FAE_CUDA_KERNELS})
target_compile_options(fae_cuda_tests PRIVATE -Wall -Wextra -O1)
set_target_properties(fae_cuda_tests PROPERTIES CXX_STANDARD 20)
target_link_libraries(fae_cuda_tests PRIVATE fae_cuda_support ${FAE_GTEST})
