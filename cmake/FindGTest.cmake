# SPDX-License-Identifier: Apache-2.0
#
# GoogleTest for the C++ tests: GTest::gtest and GTest::gtest_main.
#
# Sources come first: built here they get the flags of the preset, which ThreadSanitizer needs to
# see through their locks, and no version of CMake can disagree with theirs. They are looked for in
# PENSTOCK_GOOGLETEST_DIR (which the Makefile sets), where scripts/get_googletest.sh puts them, and
# where Debian's package googletest has them. Without sources, an installed GoogleTest is used.

set(PENSTOCK_GOOGLETEST_DIR "" CACHE PATH "Folder with GoogleTest's sources (include/, src/)")
find_path(PENSTOCK_GOOGLETEST_SOURCE src/gtest-all.cc
  PATHS ${PENSTOCK_GOOGLETEST_DIR}
        ${CMAKE_SOURCE_DIR}/build/googletest/usr/src/googletest/googletest
        /usr/src/googletest/googletest
  NO_DEFAULT_PATH)

if(PENSTOCK_GOOGLETEST_SOURCE AND NOT TARGET GTest::gtest)
  find_package(Threads REQUIRED)
  add_library(penstock_gtest STATIC ${PENSTOCK_GOOGLETEST_SOURCE}/src/gtest-all.cc)
  target_include_directories(penstock_gtest SYSTEM
    PUBLIC ${PENSTOCK_GOOGLETEST_SOURCE}/include PRIVATE ${PENSTOCK_GOOGLETEST_SOURCE})
  target_link_libraries(penstock_gtest PUBLIC Threads::Threads)
  add_library(penstock_gtest_main STATIC ${PENSTOCK_GOOGLETEST_SOURCE}/src/gtest_main.cc)
  target_link_libraries(penstock_gtest_main PUBLIC penstock_gtest)
  set_target_properties(penstock_gtest penstock_gtest_main PROPERTIES CXX_VISIBILITY_PRESET default)
  add_library(GTest::gtest ALIAS penstock_gtest)
  add_library(GTest::gtest_main ALIAS penstock_gtest_main)
elseif(NOT TARGET GTest::gtest)
  find_package(GTest CONFIG QUIET)
endif()

if(TARGET GTest::gtest AND TARGET GTest::gtest_main)
  set(GTest_FOUND TRUE)
else()
  set(GTest_FOUND FALSE)
  if(GTest_FIND_REQUIRED)
    message(FATAL_ERROR "GoogleTest not found. Run scripts/get_googletest.sh, which puts its "
      "sources under build/googletest, or install your system's GoogleTest, or configure with "
      "-DPENSTOCK_BUILD_TESTS=OFF.")
  endif()
endif()
