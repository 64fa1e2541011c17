// The kernels of a device, held until Python has checked the build and calls register_kernels. Python compares their signatures
// with the ops' schemas first: torch's stable ABI would call a kernel of another version of an op with arguments that it does
// not take.
#pragma once
#include <tuple>

#include "tensor.h"

namespace psf {

using Boxed = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

struct Kernel {
  const char* device;
  std::string name, signature;  // as "Tensor, Tensor?, float -> Tensor, Tensor"
  Boxed call;
};

// All kernels of this build; filled while the library loads.
std::vector<Kernel>& kernels();

// Makes them those of the ops. RuntimeError if the dispatcher refuses one.
void register_kernels();

// --- from a function on tensors to torch's boxed call ---

template <class X> struct Argument;
template <> struct Argument<Tensor> {
  static constexpr const char* name = "Tensor";
  static Tensor take(StableIValue x) {
    Tensor tensor(torch::stable::detail::to<AtenTensorHandle>(x));
    bool defined = false;
    aoti_torch_is_defined(tensor.get(), &defined);
    return defined ? std::move(tensor) : Tensor();
  }
  static StableIValue give(Tensor x) {
    AtenTensorHandle handle = x.release();
    if (!handle) aoti_torch_new_uninitialized_tensor(&handle);
    return torch::stable::detail::from(handle);
  }
};
template <> struct Argument<std::optional<Tensor>> {
  static constexpr const char* name = "Tensor?";
  static std::optional<Tensor> take(StableIValue x) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(x);
    if (!handle) return std::nullopt;
    Tensor tensor = Argument<Tensor>::take(torch::stable::detail::from(*handle));
    return tensor.defined() ? std::optional(std::move(tensor)) : std::nullopt;
  }
};
template <class X> struct Plain {
  static X take(StableIValue x) { return torch::stable::detail::to<X>(x); }
};
template <> struct Argument<double> : Plain<double> { static constexpr const char* name = "float"; };
template <> struct Argument<int64_t> : Plain<int64_t> { static constexpr const char* name = "int"; };
template <> struct Argument<bool> : Plain<bool> { static constexpr const char* name = "bool"; };
template <> struct Argument<Integers> : Plain<Integers> { static constexpr const char* name = "int[]"; };
template <> struct Argument<std::optional<Integers>> : Plain<std::optional<Integers>> { static constexpr const char* name = "int[]?"; };

template <class... X> std::string listed_types() {
  std::string text;
  ((text += (text.empty() ? "" : ", "), text += Argument<X>::name), ...);
  return text;
}

template <class R> struct Results {
  static std::string names() { return listed_types<R>(); }
  static void give(R x, StableIValue* stack) { stack[0] = Argument<R>::give(std::move(x)); }
};
template <class... R> struct Results<std::tuple<R...>> {
  static std::string names() { return listed_types<R...>(); }
  static void give(std::tuple<R...> x, StableIValue* stack) {
    std::apply([&](R&... one) { ((*stack++ = Argument<R>::give(std::move(one))), ...); }, x);
  }
};

template <auto f, class F = decltype(f)> struct Box;
template <auto f, class R, class... A> struct Box<f, R (*)(A...)> {
  static std::string signature() { return listed_types<std::decay_t<A>...>() + " -> " + Results<R>::names(); }
  static void call(StableIValue* stack, uint64_t, uint64_t) {
    // in braces, so from left to right; all are taken before anything can throw
    std::tuple<std::decay_t<A>...> arguments = take(stack, std::index_sequence_for<A...>());
    Results<R>::give(std::apply(f, arguments), stack);
  }
  template <size_t... i> static std::tuple<std::decay_t<A>...> take(StableIValue* stack, std::index_sequence<i...>) {
    return std::tuple<std::decay_t<A>...>{Argument<std::decay_t<A>>::take(stack[i])...};
  }
};

// Collects the kernels of one file.
struct KernelList {
  const char* device;
  template <auto f> void add(const char* name) { kernels().push_back({device, name, Box<f>::signature(), &Box<f>::call}); }
  KernelList(const char* device, void (*fill)(KernelList&)) : device(device) { fill(*this); }
};

}  // namespace psf

// PSF_KERNELS(CPU, m) { m.add<&function>("op"); }, once per file.
#define PSF_KERNELS(device, m)                                               \
  static void psf_add_kernels(psf::KernelList& m);                           \
  static const psf::KernelList psf_kernel_list(#device, &psf_add_kernels);   \
  static void psf_add_kernels(psf::KernelList& m)
