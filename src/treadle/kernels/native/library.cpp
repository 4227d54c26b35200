// The plain C interface. Functions that can run out of memory give null or a number that is not 0.
#include "decoder.h"

using namespace treadle;

extern "C" {

const char* treadle_level() { return kLevel; }

// Memory for matrices, which hold it as long as they live.
std::shared_ptr<Arena>* treadle_arena(size_t bytes) try {
  return new std::shared_ptr<Arena>(std::make_shared<Arena>(bytes));
} catch (const std::bad_alloc&) {
  return nullptr;
}

void treadle_free_arena(std::shared_ptr<Arena>* arena) { delete arena; }

size_t treadle_matrix_bytes(int format, int rows, int columns) {
  return Matrix::bytes_of(Format(format), rows, columns);
}

Matrix* treadle_matrix(const std::shared_ptr<Arena>* arena, int format, int rows, int columns,
                       const uint8_t* blocks) try {
  return new Matrix(*arena, Format(format), rows, columns, blocks);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void treadle_free_matrix(Matrix* matrix) { delete matrix; }

void treadle_in_large_pages(void* from, size_t bytes) { in_large_pages(from, bytes); }

void treadle_unpack_row(const Matrix* matrix, int row, float* y) { matrix->unpack_row(row, y); }

// y [count, rows] = x [count, columns] times the matrix, on the calling thread.
int treadle_multiply(const Matrix* matrix, const float* x, int count, float* y) try {
  Activations rounded;
  rounded.reserve(count, matrix->columns);
  for (int row = 0; row < count; ++row) rounded.set(row, x + size_t(row) * matrix->columns);
  for (int i = 0; i < matrix->strips; ++i)
    multiply(*matrix, i, rounded, 0, count, [&](int row, const f32x16* sums) {
      size_t width = std::min(kStrip, matrix->rows - i * kStrip);
      memcpy(y + size_t(row) * matrix->rows + i * kStrip, sums, width * sizeof(float));
    });
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// `matrices` holds embedding and head, then q, k, v, out, gate, up and down of each layer; `vectors`
// the last norm, then of each layer the biases of those seven, the norms before and after mixer and
// feed-forward, and those of queries and keys; `windows` and `rope_of` one number a layer. All that
// is pointed to by matrices, vectors and ropes must outlive the decoder.
Decoder* treadle_decoder(const Shape* shape, int threads, const Matrix* const* matrices,
                         const float* const* vectors, const int32_t* windows,
                         const int32_t* rope_of, const Rope* ropes) try {
  Model model{{}, {ropes, ropes + shape->ropes}, matrices[0], matrices[1], vectors[0]};
  for (int i = 0; i < shape->layers; ++i) {
    const Matrix* const* m = matrices + 2 + 7 * i;
    const float* const* v = vectors + 1 + 13 * i;
    model.layers.push_back({{m[0], v[0]}, {m[1], v[1]}, {m[2], v[2]}, {m[3], v[3]}, {m[4], v[4]},
                            {m[5], v[5]}, {m[6], v[6]}, v[7], v[8], v[9], v[10], v[11], v[12],
                            windows[i], rope_of[i]});
  }
  return new Decoder(*shape, threads, std::move(model));
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

// Of each row of logits the likeliest token, and log sum exp.
int treadle_peaks(Decoder* decoder, const float* logits, int rows, size_t stride, int32_t* tokens,
                  float* normalisers) {
  if (!decoder->alive()) return 2;
  decoder->peaks(logits, rows, stride, tokens, normalisers);
  return 0;
}
}
