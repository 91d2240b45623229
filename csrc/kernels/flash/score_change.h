// The variants of the forward kernels.
#pragma once

namespace sdpa {

// What a variant of a kernel does to the scores besides causality. The masks' variants take dropout too; kAnyMask is
// that of head dims over 128. kKeyPadding: a bool mask that is the same for every query, without dropout.
enum class ScoreChange { kNone, kDropout, kBoolMask, kFloatMask, kAnyMask, kKeyPadding };

}  // namespace sdpa
