// The dynamic 8-bit data type (arXiv 2110.02861) as arithmetic, for the CPU's and the GPU's adamw8bit.
//
// The map's values are evenly spaced within a decade and each decade has twice the values of the one below. So, with the
// values of one sign numbered by *position*, value(position) is made of straight lines, one for each power of two, found
// by the float's exponent; and position(value) is the integer part of the least of three lines for each power of four.
#pragma once

namespace cascade_fast {

constexpr int kDecades = 7;  // 1e-7 to 1, in powers of ten

struct Line {
  float offset, slope;
};

// One sign of a map. Its values are numbered by position: p = first * 2^i, first * 2^i + 1, ... are those of decade i.
struct Map {
  Line value[8];        // of a position, by its exponent modulo 8
  Line position[3][8];  // the least of three lines of a grid point's number, by that number's power of four
  float last, top;      // position of the last value, 1; grid points above `top` belong to it
  float position_scale; // positions are multiplied by it before they meet value[]

  constexpr Map(int first, int scale) : value{}, position{}, last(128.0f * first), top(0), position_scale(scale) {
    int exponent = 127;
    for (int s = first * scale; s > 1; s /= 2) ++exponent;
    double low = 1e-7;
    for (int i = 0; i < kDecades; ++i, low *= 10) {  // value = low + (position - count + 1/2) * step
      const double count = first * (1 << i), step = 9 * low / count;
      value[(exponent + i) % 8] = {static_cast<float>(low + (0.5 - count) * step), static_cast<float>(step / scale)};
      if (i == kDecades - 1) top = static_cast<float>((1 - step / 4) * kGrid);
      // The first value of a decade takes over one fifth of a step after the decade begins, halfway from the last value
      // of the decade before, whose steps are a fifth as long: a steeper line through that point and the next bound.
      // A power of four has at most one such place in it.
      double end = 4;
      for (int power = 0; power < 8; ++power, end *= 4) {
        if (i > 0 && low * kPoints < end) {
          position[0][power] = on_grid(count / 2, low / 10, step / 5);
          position[1][power] = on_grid(count - 0.25, low, 0.8 * step);
          position[2][power] = on_grid(count, low, step);
        }
      }
    }
  }

  static constexpr double kPoints = 65535, kGrid = 2 * kPoints;
  // A hair below, so that a value at a bound does not depend on the last bit, and 1 itself stays in the last decade.
  static constexpr Line on_grid(double at_low, double low, double step) {
    return {static_cast<float>(at_low - low / step - 1e-4), static_cast<float>(1 / (kGrid * step))};
  }
};

// Signed: code = 127 + position or 127 - position. The factor 4 leaves exponent 0 modulo 8 to position 0.
constexpr Map kSigned(1, 4);
constexpr Map kUnsigned(2, 1);  // code = position - 1; position 1 is the value 0, alone in its power of two

}  // namespace cascade_fast
