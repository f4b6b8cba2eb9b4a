// The Python module matryoshka.data._native: argument checks, memory and the GIL. The image work is
// in the other files.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "crop.hpp"
#include "file_map.hpp"
#include "jpeg_write.hpp"
#include "pool.hpp"
#include "sample.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace matryoshka {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CropRows = nb::ndarray<const int32_t, nb::shape<-1, 5>, nb::c_contig, nb::device::cpu>;
using ViewCrops = nb::ndarray<const int32_t, nb::shape<-1, -1, 5>, nb::c_contig, nb::device::cpu>;
using Pixels = nb::ndarray<const uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, nb::device::cpu>;
using Batch = nb::ndarray<uint8_t, nb::shape<-1, -1, -1, 3>, nb::c_contig, nb::device::cpu>;
using Interval = std::pair<double, double>;

// Any contiguous object with a buffer: bytes, memoryview, mmap, NumPy array, read-only or not.
// Holding it keeps the memory where it is, also while the GIL is released.
class Buffer {
 public:
  explicit Buffer(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  Bytes bytes() const {
    return {static_cast<const uint8_t*>(view_.buf), static_cast<size_t>(view_.len)};
  }

 private:
  Py_buffer view_;
};

void require(bool condition, const char* text) {
  if (!condition) throw nb::value_error(text);
}

void require_ok(Status status) {
  if (status != Status::ok) throw nb::value_error(message(status));
}

int as_side(size_t side) {
  require(side >= 1, "an image must have at least one pixel");
  require(side <= std::numeric_limits<int>::max(), message(Status::too_large));
  return static_cast<int>(side);
}

template <class T>
struct NewArray {
  T* data;
  nb::object array;
};

template <class T>
NewArray<T> new_array(std::initializer_list<size_t> shape) {
  size_t count = 1;
  for (size_t n : shape) count *= n;
  std::unique_ptr<T[]> memory(new T[count]);
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  T* data = memory.release();
  return {data, nb::cast(nb::ndarray<nb::numpy, T>(data, shape, owner))};
}

template <class Function>
nb::object crop_rows(const Vector<int32_t>& width, const Vector<int32_t>& height,
                     Function crop_of) {
  require(width.shape(0) == height.shape(0), "width and height differ in length");
  auto [rows, array] = new_array<int32_t>({width.shape(0), 5});
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < width.shape(0); ++i) {
      const Crop crop = crop_of(i);
      const int32_t row[5] = {crop.x, crop.y, crop.width, crop.height, crop.flip};
      std::copy(row, row + 5, rows + 5 * i);
    }
  }
  return array;
}

nb::object random_crops(Vector<int32_t> width, Vector<int32_t> height, Vector<int64_t> index,
                        uint64_t seed, uint64_t epoch, Interval scale, Interval ratio, double flip,
                        uint64_t view) {
  const auto ordered = [](Interval i) {
    return 0 < i.first && i.first <= i.second && std::isfinite(i.second);
  };
  require(index.shape(0) == width.shape(0), "width and index differ in length");
  require(ordered(scale), "scale must be two numbers with 0 < low <= high");
  require(ordered(ratio), "ratio must be two numbers with 0 < low <= high");
  require(0 <= flip && flip <= 1, "flip must be a probability");
  return crop_rows(width, height, [&](size_t i) {
    const Draw draw{static_cast<uint64_t>(index.data()[i]), seed, epoch, view};
    return random_crop(width.data()[i], height.data()[i], draw, {scale.first, scale.second},
                       {ratio.first, ratio.second}, flip);
  });
}

nb::object center_crops(Vector<int32_t> width, Vector<int32_t> height, double ratio) {
  require(0 < ratio && ratio <= 1, "ratio must be in (0, 1]");
  return crop_rows(width, height,
                   [&](size_t i) { return center_crop(width.data()[i], height.data()[i], ratio); });
}

// The samples of a batch, one array for each of their numbers.
struct Columns {
  Vector<uint64_t> offset, size;
  Vector<uint8_t> mode;
  Vector<int32_t> width, height;

  size_t count() const { return offset.shape(0); }
  Sample sample(size_t i) const {
    return {offset.data()[i], size.data()[i], mode.data()[i], width.data()[i], height.data()[i]};
  }
  void require_lengths(size_t crops, size_t out) const {
    for (const size_t length :
         {size.shape(0), mode.shape(0), width.shape(0), height.shape(0), crops, out}) {
      require(length == count(),
              "offset, size, mode, width, height, crops and out differ in length");
    }
  }
};

// The slots of one view.
struct Slots {
  uint8_t* pixels;
  int height, width;

  explicit Slots(const Batch& out)
      : pixels(out.data()), height(as_side(out.shape(1))), width(as_side(out.shape(2))) {}
  Image at(size_t i) const {
    return {pixels + 3 * static_cast<size_t>(height) * width * i, height, width};
  }
};

// slots: of one or more views, for each of which crops has a row (x, y, width, height, flip) for
// every sample.
nb::object decode(Pool& pool, nb::handle data, const Columns& columns, const int32_t* crops,
                  const std::vector<Slots>& slots, bool exact) {
  const Buffer buffer(data);
  guard_maps();
  const size_t count = columns.count();
  auto [status, array] = new_array<uint8_t>({count});
  {
    nb::gil_scoped_release release;
    std::vector<View> views(count * slots.size());  // those of a sample follow each other
    for (size_t v = 0; v < slots.size(); ++v) {
      for (size_t i = 0; i < count; ++i) {
        const int32_t* c = crops + 5 * (v * count + i);
        views[i * slots.size() + v] = {{c[0], c[1], c[2], c[3], c[4]}, slots[v].at(i)};
      }
    }
    pool.run(count, [&, status = status](size_t i, int) {
      const View* of_sample = views.data() + i * slots.size();
      const Status result =
          decode_sample(buffer.bytes(), columns.sample(i), exact, of_sample, slots.size());
      status[i] = static_cast<uint8_t>(result);
    });
  }
  return array;
}

nb::object decode_batch(Pool& pool, nb::handle data, const Vector<uint64_t>& offset,
                        const Vector<uint64_t>& size, const Vector<uint8_t>& mode,
                        const Vector<int32_t>& width, const Vector<int32_t>& height,
                        const CropRows& crops, const Batch& out, bool exact) {
  const Columns columns{offset, size, mode, width, height};
  columns.require_lengths(crops.shape(0), out.shape(0));
  return decode(pool, data, columns, crops.data(), {Slots(out)}, exact);
}

nb::object decode_views(Pool& pool, nb::handle data, const Vector<uint64_t>& offset,
                        const Vector<uint64_t>& size, const Vector<uint8_t>& mode,
                        const Vector<int32_t>& width, const Vector<int32_t>& height,
                        const ViewCrops& crops, const std::vector<Batch>& out, bool exact) {
  const Columns columns{offset, size, mode, width, height};
  require(crops.shape(0) == out.size(), "crops and out differ in the number of views");
  require(!out.empty(), "out has no view");
  std::vector<Slots> views;
  for (const Batch& view : out) {
    columns.require_lengths(crops.shape(1), view.shape(0));
    views.emplace_back(view);
  }
  return decode(pool, data, columns, crops.data(), views, exact);
}

JpegSize checked_size(Bytes jpeg) {
  JpegSize size;
  Status status;
  {
    nb::gil_scoped_release release;
    status = read_jpeg_size(jpeg, &size);
  }
  require_ok(status);
  return size;
}

std::tuple<int, int, int> jpeg_size(nb::handle data) {
  const Buffer buffer(data);
  const JpegSize size = checked_size(buffer.bytes());
  return {size.width, size.height, size.components};
}

nb::object decode_whole(nb::handle data) {
  const Buffer buffer(data);
  const JpegSize size = checked_size(buffer.bytes());
  auto [pixels, array] =
      new_array<uint8_t>({static_cast<size_t>(size.height), static_cast<size_t>(size.width), 3});
  Status status;
  {
    nb::gil_scoped_release release;
    status = decode_jpeg(buffer.bytes(), {pixels, size.height, size.width});
  }
  require_ok(status);
  return array;
}

template <class Write>
nb::bytes run_writer(Write write) {
  thread_local JpegWriter writer;
  Status status;
  {
    nb::gil_scoped_release release;
    status = write(writer);
  }
  require_ok(status);
  return nb::bytes(writer.result().data, writer.result().size);
}

nb::bytes encode(Pixels image, int quality, int tile) {
  const int height = as_side(image.shape(0));
  const int width = as_side(image.shape(1));
  require(1 <= quality && quality <= 100, "quality must be between 1 and 100");
  require(tile >= 0, "tile must be at least 0");
  return run_writer(
      [&](JpegWriter& w) { return w.encode(image.data(), width, height, quality, tile); });
}

nb::bytes transcode(nb::handle data, int tile) {
  require(tile >= 0, "tile must be at least 0");
  const Buffer buffer(data);
  return run_writer([&](JpegWriter& w) { return w.transcode(buffer.bytes(), tile); });
}

nb::object resize(const Pixels& image, int64_t height, int64_t width) {
  const int in_height = as_side(image.shape(0));
  const int in_width = as_side(image.shape(1));
  require(height >= 1 && width >= 1, "height and width must be at least 1");
  require(height <= kMaxPixels && width <= kMaxPixels && height * width <= kMaxPixels,
          message(Status::too_large));
  auto [pixels, array] =
      new_array<uint8_t>({static_cast<size_t>(height), static_cast<size_t>(width), 3});
  {
    nb::gil_scoped_release release;
    const Image out{pixels, static_cast<int>(height), static_cast<int>(width)};
    resize_image(image.data(), in_height, in_width, out);
  }
  return array;
}

// A system call's error as Python's OSError.
FileMap* open_map(int descriptor) {
  try {
    return new FileMap(descriptor);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
}

nb::object map_bytes(nb::handle self) {
  const Bytes bytes = nb::cast<const FileMap&>(self).bytes();
  using Array = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
  return nb::cast(Array(bytes.data, {bytes.size}, self));
}

// The bytes that the file has now. Further reads of the map are guarded.
int64_t begin_reading(const FileMap& map) {
  guard_maps();
  return map.file_size();
}

void forget(const FileMap& map, size_t offset, size_t size) {
  const size_t whole = map.bytes().size;
  require(offset <= whole && size <= whole - offset, "outside the file");
  map.forget(offset, size);
}

const char* status_message(int64_t code) {
  require(0 <= code && code < static_cast<int64_t>(Status::count), "code is not a status");
  return message(static_cast<Status>(code));
}

}  // namespace
}  // namespace matryoshka

NB_MODULE(_native, m) {
  using namespace matryoshka;
  m.doc() = "Crops, JPEG and resampling of whole batches, on threads, without the GIL.";
  nb::set_leak_warnings(false);  // a pool may live until the interpreter ends

  nb::class_<Pool>(m, "Pool", "Threads that decode_batch runs on; they end with this object.")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &Pool::num_threads);

  nb::class_<FileMap>(m, "FileMap",
                      "An open file mapped into memory, read-only. Where the file has lost bytes\n"
                      "since, readers find zeros; with Python's mmap, SIGBUS ends the process.")
      .def(nb::new_(&open_map), "descriptor"_a)
      .def_prop_ro("data", &map_bytes, "uint8 [size], read-only; keeps the map.")
      .def_prop_ro("torn", &FileMap::torn, "Whether a reader has found zeros for lost bytes.")
      .def("begin_reading", &begin_reading, "The file's size now. Call it before a group of reads.")
      .def("expect", &FileMap::expect, "Let the system read the file into its cache.")
      .def("forget", &forget, "offset"_a, "size"_a, "Release the pages of a part.");

  m.def("random_crops", &random_crops, "width"_a.noconvert(), "height"_a.noconvert(),
        "index"_a.noconvert(), "seed"_a, "epoch"_a, "scale"_a, "ratio"_a, "flip"_a, "view"_a = 0,
        "RandomResizedCrop and flip of (seed, epoch, index, view) as int32 rows (x, y, width,\n"
        "height, flip).");
  m.def("center_crops", &center_crops, "width"_a.noconvert(), "height"_a.noconvert(), "ratio"_a,
        "The central square of int(ratio * shorter side), as int32 rows (x, y, width, height, 0).");
  m.def(
      "decode_batch", &decode_batch, "pool"_a, "data"_a, "offset"_a.noconvert(),
      "size"_a.noconvert(), "mode"_a.noconvert(), "width"_a.noconvert(), "height"_a.noconvert(),
      "crops"_a.noconvert(), "out"_a.noconvert(), "exact"_a = true,
      "Decode, crop and resize samples of the file image `data` into out [B, H, W, 3]. Returns a\n"
      "status per sample, 0 for success; a failed sample's slot is zero. Data outside the crop\n"
      "may stay unread. exact: the same pixels as from resampling the whole decoded image;\n"
      "False: faster, for training.");
  m.def("decode_views", &decode_views, "pool"_a, "data"_a, "offset"_a.noconvert(),
        "size"_a.noconvert(), "mode"_a.noconvert(), "width"_a.noconvert(), "height"_a.noconvert(),
        "crops"_a.noconvert(), "out"_a.noconvert(), "exact"_a = true,
        "decode_batch for several views of every sample: crops int32 [V, B, 5], out a list of V\n"
        "arrays [B, H, W, 3]. The pixels are those of V calls of decode_batch. A sample has one\n"
        "status: where it is not 0, all its slots are zero.");
  m.def("decode", &decode_whole, "data"_a, "Decode a whole JPEG to uint8 [height, width, 3].");
  m.def("jpeg_size", &jpeg_size, "data"_a, "(width, height, components) from a JPEG's header.");
  m.def("encode", &encode, "image"_a.noconvert(), "quality"_a, "tile"_a = 64,
        "Encode uint8 [height, width, 3] as a 4:2:0 JPEG with a restart marker about every `tile`\n"
        "pixels; 0: without markers.");
  m.def("transcode", &transcode, "data"_a, "tile"_a = 64,
        "Copy a baseline JPEG, with a restart marker about every `tile` pixels (0: without). The\n"
        "copy is read again: its coefficients equal the source's. ValueError for damaged,\n"
        "progressive, arithmetic and CMYK files.");
  m.def("resize", &resize, "image"_a.noconvert(), "height"_a, "width"_a,
        "Resize: area averaging where an axis shrinks, bilinear where it grows.");
  m.def("status_message", &status_message, "code"_a, "The message for a status of decode_batch.");
}
