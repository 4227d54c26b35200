// The native library behind a pipe: what a processor of another kind computes, under an emulator.
// Commands and their bytes are those of emulated.py.
#include <cstdio>
#include <deque>

#include "library.cpp"

namespace {

void read(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(0);
}

template <class T>
T number() {
  T value;
  read(&value, sizeof value);
  return value;
}

template <class T>
std::vector<T> numbers() {
  std::vector<T> values(number<int32_t>());
  read(values.data(), values.size() * sizeof(T));
  return values;
}

template <class T>
void answer(const T* from, size_t count) {
  fwrite(from, sizeof(T), count, stdout);
  fflush(stdout);
}

std::vector<Matrix*> matrices;
std::vector<Decoder*> decoders;
std::deque<std::vector<float>> kept;  // what decoders point to

void level() {
  char name[16] = {};
  strncpy(name, treadle_level(), sizeof name - 1);
  answer(name, sizeof name);
}

void take_matrix() {
  auto about = numbers<int32_t>();
  auto blocks = numbers<uint8_t>();
  auto* arena = treadle_arena(treadle_matrix_bytes(about[0], about[1], about[2]));
  matrices.push_back(treadle_matrix(arena, about[0], about[1], about[2], blocks.data()));
  treadle_free_arena(arena);
}

void unpack_row() {
  auto about = numbers<int32_t>();
  std::vector<float> y(matrices[about[0]]->columns);
  treadle_unpack_row(matrices[about[0]], about[1], y.data());
  answer(y.data(), y.size());
}

void multiply_rows() {
  auto about = numbers<int32_t>();
  auto x = numbers<float>();
  std::vector<float> y(size_t(about[1]) * matrices[about[0]]->rows);
  treadle_multiply(matrices[about[0]], x.data(), about[1], y.data());
  answer(y.data(), y.size());
}

void take_decoder() {
  auto shape = number<Shape>();
  int threads = number<int32_t>();
  std::vector<const Matrix*> used;
  for (int i : numbers<int32_t>()) used.push_back(matrices[i]);
  std::vector<const float*> vectors(number<int32_t>());
  for (auto& v : vectors) {
    kept.push_back(numbers<float>());
    v = kept.back().empty() ? nullptr : kept.back().data();
  }
  auto windows = numbers<int32_t>(), rope_of = numbers<int32_t>();
  std::vector<Rope> ropes(shape.ropes);
  for (Rope& rope : ropes) {
    rope.factor = number<float>();
    kept.push_back(numbers<float>());
    rope.count = int32_t(kept.back().size());
    rope.frequencies = kept.back().data();
  }
  decoders.push_back(treadle_decoder(&shape, threads, used.data(), vectors.data(), windows.data(),
                                     rope_of.data(), ropes.data()));
}

void run() {
  auto about = numbers<int32_t>();  // decoder, stride, rows and width of the result, of what kind
  auto tokens = numbers<int32_t>(), counts = numbers<int32_t>(), starts = numbers<int32_t>(),
       outputs = numbers<int32_t>(), tables = numbers<int32_t>(), table_at = numbers<int32_t>();
  auto pages = numbers<uint16_t>();
  size_t size = size_t(about[2]) * about[1];
  Buffer<float> result(size + 64);  // aligned, as the streaming stores want it
  Pass pass{int32_t(counts.size()), tokens.data(), counts.data(), starts.data(), outputs.data(),
            tables.data(), table_at.data(), pages.data(), about[3] ? nullptr : result.data(),
            about[3] ? result.data() : nullptr, about[1]};
  int32_t done = treadle_run(decoders[about[0]], &pass);
  answer(&done, 1);
  answer(pages.data(), pages.size());
  answer(result.data(), size);
}

}  // namespace

int main() {
  for (;;) switch (number<char>()) {
      case 'l': level(); break;
      case 'm': take_matrix(); break;
      case 'u': unpack_row(); break;
      case 'x': multiply_rows(); break;
      case 'd': take_decoder(); break;
      case 'p': run(); break;
      default: return 1;
    }
}
