// The pybind11 module sdpa._C: the fast path of an eager call, the switches, and the selector for explain().
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <functional>
#include <memory>
#include <numeric>
#include <optional>

#include "ops/attention.h"
#include "ops/inputs.h"
#include "registry.h"

namespace py = pybind11;

namespace sdpa {
namespace {

Problem problem_of(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& attn_mask,
                   double dropout_p, bool is_causal, std::optional<double> scale, bool enable_gqa, bool grad_wanted,
                   std::optional<int> capability) {
  const Tensor mask = attn_mask.value_or(Tensor());
  const Inputs in = check({query, key, value, mask, dropout_p, is_causal, scale, enable_gqa});
  Problem problem;
  bool first = true;
  for_each_4d({in.query, in.key, in.value, in.attn_mask}, 0, [&](const FourDims& t, int64_t) {
    if (!first) return;
    first = false;
    Call call;
    call.query = t[0];
    call.key = t[1];
    call.value = t[2];
    call.attn_mask = t[3];
    call.scale = in.scale;
    call.is_causal = is_causal;
    call.dropout_p = dropout_p;
    problem = describe(call, {grad_wanted, grad_wanted && mask.defined() && mask.requires_grad(), in.mask_broadcasts});
  });
  // All leading dims, also where the op walks over the outer ones because their strides do not fold.
  if (in.lead.size() > 2) {
    problem.B = std::accumulate(in.lead.begin(), in.lead.end() - 1, int64_t{1}, std::multiplies<int64_t>());
  }
  if (capability) {
    problem.device_type = DeviceType::kCUDA;
    problem.capability = problem.device_capability = *capability;
    problem.hypothetical = true;
  }
  return problem;
}

Backend backend_of(int number) {
  TORCH_CHECK_VALUE(number >= 1 && number <= 3, "no backend has the number ", number);
  return static_cast<Backend>(number);
}

py::list constraint_list(const Problem& problem, int backend) {
  py::list rows;
  for (const Constraint& c : constraints(backend_of(backend))) {
    py::dict row;
    row["name"] = c.name;
    row["holds"] = c.holds(problem);
    row["got"] = c.got(problem);
    row["needs"] = c.needs;
    row["fix"] = c.fix;
    rows.append(row);
  }
  return rows;
}

py::list variant_list() {
  py::list rows;
  for (const Variant& v : variants()) {
    py::dict row;
    row["name"] = v.name;
    row["backend"] = static_cast<int>(v.backend);
    row["direction"] = name(v.direction);
    row["path"] = v.path;
    row["dtype"] = name(v.dtype);
    row["head_dim"] = v.head_dim;
    py::list chips;
    for (const Chip& chip : v.chips) {
      chips.append(std::to_string(chip.capability) + (chip.specific ? "a" : "") + (chip.ptx ? "+PTX" : ""));
    }
    row["chips"] = chips;
    rows.append(row);
  }
  return rows;
}

py::object variant_for(const Problem& problem, int backend, bool backward) {
  const Variant* v = find_variant(backend_of(backend), backward, problem);
  return v == nullptr ? py::object(py::none()) : py::object(py::str(v->name));
}

py::object* switches_source = nullptr;  // never freed: no Python to free it in at exit

Switches python_switches() {
  const py::gil_scoped_acquire gil;
  return (*switches_source)().cast<Switches>();
}

using Mode = std::shared_ptr<c10::impl::PyObject_TorchDispatchMode>;

Mode mode(c10::impl::TorchDispatchModeKey key) {
  return c10::impl::TorchDispatchModeTLS::get_mode(key).value_or(nullptr);
}

// The trace that is running, AOTAutograd's or torch.export's; null: none is.
Mode trace() {
  const Mode functional = mode(c10::impl::TorchDispatchModeKey::FUNCTIONAL);
  return functional ? functional : mode(c10::impl::TorchDispatchModeKey::PROXY);
}

const PyObject* object(const Mode& mode) {
  return mode ? mode->ptr(&mode->pyinterpreter()) : nullptr;
}

// What a graph set, where it was set. A graph may end, by an error or a graph break, before it has set back: so a
// trace's hold in that trace alone, and those of a graph that runs only over the thread's switches of then.
struct TracedSwitches {
  Switches value, over;
  Mode trace;
};
thread_local std::optional<TracedSwitches> traced_switches;

}  // namespace

Switches current_switches() {
  const Switches own = python_switches();
  const auto& set = traced_switches;
  return set && set->over == own && object(set->trace) == object(trace()) ? set->value : own;
}

void set_traced_switches(Switches switches) {
  check_switches(switches);
  traced_switches.reset();
  // Dynamo tries the node with fake tensors while it builds the graph; that is no run of the graph.
  if (trace() || !mode(c10::impl::TorchDispatchModeKey::FAKE)) traced_switches = {switches, python_switches(), trace()};
}

void forget_traced_switches() {
  traced_switches.reset();
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("attention", torch::wrap_pybind_function_no_gil(attention), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("attn_mask"), py::arg("dropout_p"), py::arg("is_causal"), py::arg("scale"), py::arg("enable_gqa"),
        py::arg("backends"));
  m.def("current_switches", &current_switches);
  m.def("set_switches_source", [](py::object source) { switches_source = new py::object(std::move(source)); });
  m.def("forget_traced_switches", &forget_traced_switches);
  m.attr("ALL_BACKENDS") = kAllBackends;

  py::class_<Problem>(m, "Problem")
      .def("__repr__", [](const Problem& p) { return to_string(p); })
      .def_readonly("capability", &Problem::capability)
      .def_readonly("grad_wanted", &Problem::grad_wanted)
      .def_property_readonly("scores", [](const Problem& p) { return p.B * p.H * p.L * p.S; });
  m.def("problem", torch::wrap_pybind_function(problem_of), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("attn_mask"), py::arg("dropout_p"), py::arg("is_causal"), py::arg("scale"), py::arg("enable_gqa"),
        py::arg("grad_wanted"), py::arg("capability"));
  m.def("select", [](const Problem& p, Switches s) { return static_cast<int>(select(p, check_switches(s))); });
  m.def("reasons", [](const Problem& p, Switches s) { return reasons(p, check_switches(s)); });
  m.def("constraints", torch::wrap_pybind_function(constraint_list));
  m.def("variants", variant_list);
  m.def("variant_for", torch::wrap_pybind_function(variant_for));
  m.def("math_scratch_bytes", &math_scratch_bytes);
  m.def("math_scratch_limit", &math_scratch_limit);
  m.def("set_math_scratch_limit", torch::wrap_pybind_function(set_math_scratch_limit));
}

}  // namespace sdpa
