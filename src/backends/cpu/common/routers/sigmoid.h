// SPDX-License-Identifier: Apache-2.0
//
// The sigmoid that the routers share, in double whatever the logits' dtype.
#pragma once

#include <cmath>

namespace penstock::cpu {

inline double sigmoid(double logit) { return 1.0 / (1.0 + std::exp(-logit)); }

}  // namespace penstock::cpu
