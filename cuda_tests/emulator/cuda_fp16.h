#pragma once

#include "half.h"

using __half = emulator::Half<10>;
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return __half(value); }
