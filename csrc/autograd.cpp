// probsym_fast._autograd: the gradient of every op, derived from the names in the schema of <op>_backward:
//   argument d_<result>   gradient of that result of the op; None if there is none (no call if it is not optional)
//   argument needs_<argument>  bool: whether its result d_<argument> is needed
//   any other argument    the op's argument or result of that name
//   result d_<argument>   gradient of that argument of the op
// The gradient of <op>_backward itself is computed in Python (ops/_second_gradient.py), only where it is differentiated.
// It needs torch's unstable headers, so it is built for one version of torch. With another one ops/_op.py does the same in
// Python, at up to twice the cost of a call.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/library.h>
#include <torch/version.h>

#include <pybind11/pybind11.h>


namespace psf {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

struct Source {
  enum Kind { gradient, tensor, value, result, needed } kind;  // tensor, value, needed: an argument of the op
  size_t index = 0;
  bool required = true;  // gradient: the backward needs it
};

struct Derivation {
  c10::OperatorHandle backward;
  std::vector<Source> takes;  // where each argument of the backward comes from
  std::vector<size_t> gives;  // the op's argument that each result of the backward belongs to
};

// The part of the name after the prefix; empty without it.
std::string after(const std::string& prefix, const std::string& name) {
  return name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : "";
}

std::optional<size_t> find(const std::vector<c10::Argument>& names, const std::string& name) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i].name() == name) return i;
  return std::nullopt;
}

bool is_optional(const c10::Argument& x) { return x.type()->kind() == c10::TypeKind::OptionalType; }

bool is_tensor(const c10::Argument& x) {
  const c10::TypePtr type = x.type();
  return type->isSubtypeOf(*c10::TensorType::get()) || type->isSubtypeOf(*c10::OptionalType::ofTensor());
}

c10::OperatorHandle schema(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("probsym_fast::" + name).c_str(), "");
}

Derivation derive(const std::string& name) {
  Derivation derivation{schema(name + "_backward"), {}, {}};
  const c10::FunctionSchema op = schema(name).schema();
  for (const c10::Argument& x : derivation.backward.schema().arguments()) {
    const auto gradient_of = find(op.returns(), after("d_", x.name())), needed = find(op.arguments(), after("needs_", x.name()));
    const auto argument = find(op.arguments(), x.name()), result = find(op.returns(), x.name());
    TORCH_CHECK(gradient_of || needed || argument || result, name, "_backward: no meaning for argument ", x.name());
    derivation.takes.push_back(needed               ? Source{Source::needed, *needed}
                         : gradient_of        ? Source{Source::gradient, *gradient_of, !is_optional(x)}
                         : argument           ? Source{is_tensor(x) ? Source::tensor : Source::value, *argument}
                                              : Source{Source::result, *result});
  }
  for (const c10::Argument& x : derivation.backward.schema().returns()) {
    const auto argument = find(op.arguments(), after("d_", x.name()));
    TORCH_CHECK(argument, name, "_backward: no meaning for result ", x.name());
    derivation.gives.push_back(*argument);
  }
  return derivation;
}

// A boxed call passing through autograd.
struct Call {
  const c10::OperatorHandle& op;
  c10::DispatchKeySet keys;
  Stack* stack;
  mutable std::vector<bool> absent;  // results that the kernel omitted; autograd sees the others
  mutable variable_list made;        // the other results, and the context that saves some of them
  mutable AutogradContext* keeper = nullptr;
  size_t arguments() const { return op.schema().arguments().size(); }
  size_t results() const { return op.schema().returns().size(); }
  const IValue& argument(size_t i) const { return torch::jit::peek(*stack, i, arguments()); }
  bool has_tensor(size_t i) const { return argument(i).isTensor() && argument(i).toTensor().defined(); }
  variable_list tensors() const {  // the given ones, in the order of the arguments
    variable_list list;
    for (size_t i = 0; i < arguments(); ++i)
      if (has_tensor(i)) list.push_back(argument(i).toTensor());
    return list;
  }
  variable_list below_autograd() const {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    variable_list list;
    for (const IValue& x : torch::jit::last(*stack, results())) {
      absent.push_back(!x.isTensor() || !x.toTensor().defined());
      if (!absent.back()) list.push_back(x.toTensor());
    }
    torch::jit::drop(*stack, results());
    return list;
  }
};

bool recorded(const variable_list& tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.requires_grad() || x._fw_grad(0).defined(); });
}

template <class Function, class... Extra> struct Recorded : c10::OperatorKernel {
  std::tuple<Extra...> extra;
  explicit Recorded(Extra... extra) : extra(std::move(extra)...) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const Call call{op, keys, stack, {}, {}};
    const variable_list tensors = call.tensors();
    if (!recorded(tensors)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    try {
      const variable_list results = Function::apply(at::TensorList(tensors), &call, &std::get<0>(extra));
      auto next = results.begin();
      for (const bool absent : call.absent) stack->emplace_back(absent ? Tensor() : *next++);
    } catch (...) {
      // A hook on saved tensors threw, as checkpoints do to end a recomputation. Context, node and saved results would keep
      // each other alive forever.
      const auto has_node = [](const Tensor& x) { return x.grad_fn() != nullptr; };  // without a node the context is gone
      if (std::any_of(call.made.begin(), call.made.end(), has_node)) call.keeper->save_for_backward({});
      throw;
    }
  }
};

struct FirstGradient : torch::autograd::Function<FirstGradient> {
  static variable_list forward(AutogradContext* ctx, at::TensorList, const Call* call, const Derivation* derivation) {
    variable_list kept, integers;
    std::vector<IValue> values;
    std::vector<int64_t> given;  // the arguments with an edge
    for (size_t i = 0; i < call->arguments(); ++i)
      if (call->has_tensor(i)) given.push_back(static_cast<int64_t>(i));
    for (const Source& source : derivation->takes) {
      if (source.kind == Source::value) values.push_back(call->argument(source.index));
      if (source.kind == Source::tensor) kept.push_back(call->has_tensor(source.index) ? call->argument(source.index).toTensor() : Tensor());
    }
    const variable_list results = call->below_autograd();
    call->made = results;
    call->keeper = ctx;
    for (const Source& source : derivation->takes)
      if (source.kind == Source::result) kept.push_back(results[source.index]);
    for (const Tensor& x : results)
      if (x.defined() && !x.is_floating_point()) integers.push_back(x);
    ctx->save_for_backward(std::move(kept));
    ctx->mark_non_differentiable(integers);
    ctx->set_materialize_grads(false);
    ctx->saved_data["values"] = c10::ivalue::Tuple::create(std::move(values));
    ctx->saved_data["derivation"] = reinterpret_cast<int64_t>(derivation);
    ctx->saved_data["given"] = std::move(given);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const Derivation& derivation = *reinterpret_cast<const Derivation*>(ctx->saved_data["derivation"].toInt());
    const auto values = ctx->saved_data["values"].toTuple();
    const variable_list kept = ctx->get_saved_variables();
    const std::vector<int64_t> given = ctx->saved_data["given"].toIntVector();
    const auto edge = [&](size_t argument) {  // given.size() where no gradient is asked for
      const auto at = static_cast<size_t>(std::find(given.begin(), given.end(), static_cast<int64_t>(argument)) - given.begin());
      return at < given.size() && ctx->needs_input_grad(at) ? at : given.size();
    };
    variable_list out(given.size() + 2);  // call and derivation have none
    Stack stack;
    size_t next_value = 0, next_tensor = 0, next_result = 0;
    for (const Source& source : derivation.takes) next_result += source.kind == Source::tensor;  // saved results follow saved tensors
    for (const Source& source : derivation.takes) {
      if (source.kind == Source::value) {
        stack.push_back(values->elements()[next_value++]);
      } else if (source.kind == Source::needed) {
        stack.emplace_back(edge(source.index) < given.size());
      } else {
        const Tensor& x = source.kind == Source::gradient ? gradients[source.index]
                          : source.kind == Source::tensor ? kept[next_tensor++]
                                                          : kept[next_result++];
        if (source.kind == Source::gradient && source.required && !x.defined()) return out;  // no gradient in, none out
        stack.push_back(x.defined() ? IValue(x) : IValue());
      }
    }
    try {
      derivation.backward.callBoxed(&stack);
    } catch (const py::type_error& error) {  // torch's engine would make these RuntimeErrors
      C10_THROW_ERROR(TypeError, error.what());
    } catch (const py::value_error& error) {
      C10_THROW_ERROR(ValueError, error.what());
    }
    for (size_t i = 0; i < derivation.gives.size(); ++i)
      if (const size_t at = edge(derivation.gives[i]); at < given.size()) out[at] = stack[i].toTensor();
    return out;
  }
};

// Of a call of <op>_backward: second(arguments, gradients of the results) gives the gradients of the arguments.
struct SecondGradient : torch::autograd::Function<SecondGradient> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Call* call, const py::object* second) {
    std::vector<IValue> values;  // None for the tensors, which are saved
    std::vector<int64_t> given, present;
    for (size_t i = 0; i < call->arguments(); ++i) {
      if (call->has_tensor(i)) given.push_back(static_cast<int64_t>(i));
      values.push_back(call->has_tensor(i) ? IValue() : call->argument(i));
    }
    const variable_list results = call->below_autograd();
    for (size_t i = 0; i < call->absent.size(); ++i)
      if (!call->absent[i]) present.push_back(static_cast<int64_t>(i));
    ctx->save_for_backward(tensors.vec());
    ctx->set_materialize_grads(false);
    ctx->saved_data["values"] = c10::ivalue::Tuple::create(std::move(values));
    ctx->saved_data["given"] = std::move(given);
    ctx->saved_data["present"] = std::move(present);
    ctx->saved_data["results"] = static_cast<int64_t>(call->results());
    ctx->saved_data["second"] = reinterpret_cast<int64_t>(second);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto& second = *reinterpret_cast<const py::object*>(ctx->saved_data["second"].toInt());
    std::vector<IValue> arguments = ctx->saved_data["values"].toTuple()->elements().vec();
    const variable_list kept = ctx->get_saved_variables();
    const std::vector<int64_t> given = ctx->saved_data["given"].toIntVector(), present = ctx->saved_data["present"].toIntVector();
    std::vector<IValue> incoming(ctx->saved_data["results"].toInt());
    for (size_t k = 0; k < given.size(); ++k) arguments[given[k]] = kept[k];
    for (size_t k = 0; k < present.size(); ++k)
      if (gradients[k].defined()) incoming[present[k]] = gradients[k];
    variable_list out(given.size() + 2);  // call and second have none
    const py::gil_scoped_acquire gil;
    const py::list found = second(python(arguments), python(incoming));
    for (size_t k = 0; k < given.size(); ++k)
      if (const py::handle x = found[given[k]]; !x.is_none()) out[k] = x.cast<Tensor>();
    return out;
  }

  static py::list python(const std::vector<IValue>& values) {
    py::list list;
    for (const IValue& x : values) list.append(torch::jit::toPyObject(x));
    return list;
  }
};

}  // namespace

// Makes the op probsym_fast::<name> differentiable by probsym_fast::<name>_backward, and this by the Python function
// second(arguments, gradients of the results), which gives a list of the arguments' gradients.
void make_differentiable(const std::string& name, py::object second) {
  // never destroyed: the dispatcher may be destroyed first
  static auto& library = *new torch::Library(torch::Library::IMPL, "probsym_fast", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Recorded<FirstGradient, Derivation>>(derive(name))));
  library.impl((name + "_backward").c_str(),
               torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Recorded<SecondGradient, py::object>>(std::move(second))));
}

}  // namespace psf

PYBIND11_MODULE(_autograd, m) {
  m.attr("torch_version") = TORCH_VERSION;
  m.def("make_differentiable", &psf::make_differentiable, "Makes an op differentiable by its <op>_backward, and this by a function.");
}
