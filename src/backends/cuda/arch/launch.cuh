// SPDX-License-Identifier: Apache-2.0
//
// Programmatic dependent launch: a kernel may start while the one before it in the stream still
// runs, so that its prologue overlaps the other's end. Whatever touches global memory comes after
// wait_for_earlier_launches(), in every thread that does, also in CTAs without work: a grid that
// ended without waiting would let its successor run before its predecessor's results are there.
#pragma once

namespace penstock::cuda::arch {

// Returns once every grid that this one depends on has ended and its writes can be seen.
__device__ __forceinline__ void wait_for_earlier_launches() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next grid of the stream may start once every CTA has said so or ended.
__device__ __forceinline__ void let_later_launches_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace penstock::cuda::arch
