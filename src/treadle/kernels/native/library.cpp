// The plain C interface. Functions that can run out of memory give null or a number that is not 0.
#include "decoder.h"

using namespace treadle;

extern "C" {

int treadle_vectorised() {
#ifdef TREADLE_AVX512
  return 1;
#else
  return 0;
#endif
}

Matrix* treadle_matrix(int format, int rows, int columns, const uint8_t* blocks) try {
  return new Matrix(Format(format), rows, columns, blocks);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void treadle_free_matrix(Matrix* matrix) { delete matrix; }

void treadle_unpack_row(const Matrix* matrix, int row, float* y) { matrix->unpack_row(row, y); }

// y [count, rows] = x [count, columns] times the matrix, on the calling thread.
int treadle_multiply(const Matrix* matrix, const float* x, int count, float* y) try {
  Activations rounded;
  rounded.reserve(count, matrix->columns);
  for (int row = 0; row < count; ++row)
    rounded.set(row, x + size_t(row) * matrix->columns, matrix->columns);
  multiply(*matrix, 0, matrix->strips, rounded, count, [&](int strip, int row, f32x16 sums) {
    size_t width = std::min(kStrip, matrix->rows - strip * kStrip);
    memcpy(y + size_t(row) * matrix->rows + strip * kStrip, &sums, width * sizeof(float));
  });
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// `matrices` holds embedding and head, then qkv, out, gate_up and down of each layer; `norms` the
// last norm, then both of each layer. All that is pointed to must outlive the decoder.
Decoder* treadle_decoder(const Shape* shape, int threads, const Matrix* const* matrices,
                         const float* const* norms, const float* frequencies,
                         uint16_t* pages) try {
  std::vector<Layer> layers;
  for (int i = 0; i < shape->layers; ++i) {
    const Matrix* const* m = matrices + 2 + 4 * i;
    layers.push_back({m[0], m[1], m[2], m[3], norms[1 + 2 * i], norms[2 + 2 * i]});
  }
  return new Decoder(*shape, threads, std::move(layers), matrices[0], matrices[1], norms[0],
                     frequencies, pages);
} catch (const std::exception&) {
  return nullptr;
}

void treadle_free_decoder(Decoder* decoder) { delete decoder; }

int treadle_run(Decoder* decoder, const Pass* pass) try {
  if (!decoder->alive()) return 2;
  decoder->run(*pass);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
}
