// The devices "cuda" of a torch that was built without CUDA, for the emulator: their memory is the host's.
//
// Behind each array lie some bytes that nobody may change, which is looked at after each kernel.
//
// With LUTRA_EMULATE_DEVICES=2 and more, arrays take whole pages, and while a device runs a kernel the others' pages
// are closed: a kernel that reads the memory of another device ends the process.
//
// Allocation, views and copies are here; every other operator of torch copies its tensors to the CPU, runs there and
// copies the results back. tests/cuda/emulation.py loads this and fits torch.cuda to it.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace {

constexpr auto kDevice = c10::DeviceType::CUDA;

int devices() {
  static const int count = [] {
    const char* text = getenv("LUTRA_EMULATE_DEVICES");
    return text && atoi(text) > 1 ? atoi(text) : 1;
  }();
  return count;
}
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex exchange(c10::DeviceIndex device) {
  const auto before = current;
  if (device >= 0) current = device;
  return before;
}
struct On {  // a device, for as long as it lives
  c10::DeviceIndex before;
  explicit On(std::optional<c10::Device> d) : before(exchange(d ? d->index() : -1)) {}
  ~On() { current = before; }
};

struct HostAllocator final : c10::Allocator {
  static constexpr size_t kBehind = 2048;
  static constexpr unsigned char kUntouched = 0xc5;
  struct Array {
    size_t bytes;  // of which kBehind lie behind it
    int device;
  };
  static std::map<void*, Array>& arrays() {
    static std::map<void*, Array> p;
    return p;
  }
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static void release(void* p) {
    const std::lock_guard<std::mutex> hold(lock());
    const auto found = arrays().find(p);
    if (found == arrays().end()) return;
    if (devices() == 1)
      free(p);
    else
      munmap(p, found->second.bytes);
    arrays().erase(found);
  }
  static int64_t written_behind(int device) {  // an array's bytes, or -1
    const std::lock_guard<std::mutex> hold(lock());
    for (const auto& [p, held] : arrays()) {
      if (devices() > 1 && held.device != device) continue;  // closed
      const unsigned char* end = static_cast<unsigned char*>(p) + held.bytes;
      for (const unsigned char* at = end - kBehind; at < end; ++at)
        if (*at != kUntouched) return static_cast<int64_t>(held.bytes - kBehind);
    }
    return -1;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* p = nullptr;
    const size_t all = bytes + kBehind;
    if (bytes && devices() == 1) {
      if (posix_memalign(&p, 512, all)) throw std::bad_alloc();
    } else if (bytes) {
      p = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
    }
    if (p) {
      memset(p, 0x7f, bytes);  // what nobody wrote is seen
      memset(static_cast<char*>(p) + bytes, kUntouched, kBehind);
      const std::lock_guard<std::mutex> hold(lock());
      arrays()[p] = {all, current};
    }
    return {p, p, &release, c10::Device(kDevice, current)};
  }
  static void close_others(int device, bool closed) {
    const std::lock_guard<std::mutex> hold(lock());
    for (const auto& [p, held] : arrays())
      if (held.device != device) mprotect(p, held.bytes, closed ? PROT_NONE : PROT_READ | PROT_WRITE);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
HostAllocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device d) const override { return {kDevice, exchange(d.index())}; }
  c10::Device getDevice() const override { return {kDevice, current}; }
  void setDevice(c10::Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { exchange(d.index()); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(devices()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Pinned memory of the host is memory like any other; its addresses are known.
struct PinnedAllocator final : c10::Allocator {
  static std::map<const char*, size_t>& known() {
    static std::map<const char*, size_t> k;
    return k;
  }
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static void release(void* p) {
    const std::lock_guard<std::mutex> hold(lock());
    known().erase(static_cast<const char*>(p));
    free(p);
  }
  static bool holds(const void* p) {
    const std::lock_guard<std::mutex> hold(lock());
    auto next = known().upper_bound(static_cast<const char*>(p));
    if (next == known().begin()) return false;
    --next;
    return static_cast<const char*>(p) < next->first + next->second;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* p = nullptr;
    if (posix_memalign(&p, 512, bytes ? bytes : 1)) throw std::bad_alloc();
    const std::lock_guard<std::mutex> hold(lock());
    known()[static_cast<const char*>(p)] = bytes;
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedAllocator pinned;

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(devices()); }
  int getNumGPUs() const override { return devices(); }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { return exchange(d); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchange(d); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void* p) const override { return PinnedAllocator::holds(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator g = at::detail::createCPUGenerator();
    return g;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const On there(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const On there(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor on the CPU.
at::Tensor on_cpu(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  at::Tensor alias = at::from_blob(
      t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr, t.sizes(), t.strides(), [t](void*) {},
      t.options().device(at::kCPU));
  if (t.is_neg()) alias._set_neg(true);
  if (t.is_conj()) alias._set_conj(true);
  return alias;
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool) {
  if (self.numel() || source.numel()) on_cpu(self).copy_(on_cpu(source));
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

const at::Tensor& resize_storage(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  c10::TensorImpl* t = self.unsafeGetTensorImpl();
  t->set_sizes_contiguous(size);
  const auto storage = t->unsafe_storage();
  const size_t bytes = static_cast<size_t>(t->numel() + t->storage_offset()) * t->dtype().itemsize();
  if (storage.nbytes() < bytes) {
    const On there(self.device());
    c10::DataPtr fresh = allocator.allocate(bytes);
    if (storage.nbytes()) memcpy(fresh.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) resize_storage(to, self.sizes(), std::nullopt);
  on_cpu(to).copy_(on_cpu(self));
  return to;
}

at::Scalar local_scalar(const at::Tensor& self) { return on_cpu(self).item(); }

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

// The CPU has no product of 16-bit matrices with a result of float32.
at::Tensor bmm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return on_cpu(a).to(dtype).bmm(on_cpu(b).to(dtype)).to(a.device());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("copy_", copy);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_storage);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("bmm.dtype", bmm_dtype);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

namespace {
const bool registered = [] {
  c10::SetAllocator(kDevice, &allocator);
  return true;
}();
}  // namespace

// For tests/emulation.py and for the machine (machine.cc).
#define LUTRA_SEEN extern "C" __attribute__((visibility("default")))
LUTRA_SEEN int lutra_emulated_device(int device) { return exchange(static_cast<c10::DeviceIndex>(device)); }
LUTRA_SEEN int64_t lutra_emulated_written_behind(int device) { return HostAllocator::written_behind(device); }
LUTRA_SEEN void lutra_emulated_close(int device, int closed) { HostAllocator::close_others(device, closed != 0); }
