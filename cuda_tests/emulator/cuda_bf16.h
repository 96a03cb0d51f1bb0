#pragma once

#include "half.h"

using __nv_bfloat16 = emulator::Half<7>;
inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
