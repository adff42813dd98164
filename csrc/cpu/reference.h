// The oracle: attention in double precision, written for reading.
//
// One row at a time, O(seq_kv) memory for it, nothing blocked, nothing reordered.
// The tests compare every kernel with it; it shares no arithmetic with them.
#pragma once

#include "core/problem.h"

namespace fae::cpu {

// Writes call.out, and call.lse when it is given.
void reference_forward(const ForwardCall& call);

// Writes dq, dk, dv, and dbias when it is given. Probabilities and the row sums
// of dout * out are computed afresh in double: call.out and call.lse, which are
// rounded to the caller's dtype, are not read.
void reference_backward(const BackwardCall& call);

}  // namespace fae::cpu
