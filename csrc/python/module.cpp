// flash_attn_ext._C: introspection, and attention on arrays of any library.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "cpu/api.h"
#include "cpu/dispatch.h"
#include "cpu/std_executor.h"
#include "python/array_argument.h"
#include "python/call_dict.h"

namespace py = pybind11;

namespace fae::python {
namespace {

const char* kind_name(CallError::Kind kind) {
  switch (kind) {
    case CallError::Kind::kType: return "type";
    case CallError::Kind::kNotImplemented: return "not_implemented";
    case CallError::Kind::kRuntime: return "runtime";
    default: return "value";
  }
}

[[noreturn]] void raise(const CallError& error) {
  if (error.kind == CallError::Kind::kType) throw py::type_error(error.text);
  if (error.kind == CallError::Kind::kValue) throw py::value_error(error.text);
  PyErr_SetString(PyExc_NotImplementedError, error.text.c_str());
  throw py::error_already_set();
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

// The ISA files of this build; build_tools/native.py lists them in FAE_ISAS.
std::vector<cpu::Isa> compiled_isas() {
  const std::string built = "," FAE_ISAS ",";
  std::vector<cpu::Isa> isas;
  for (const cpu::Isa isa : {cpu::Isa::kScalar, cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAvx512Bf16,
                             cpu::Isa::kAmx, cpu::Isa::kNeon}) {
    if (built.find("," + std::string(cpu::name_of(isa)) + ",") != std::string::npos) isas.push_back(isa);
  }
  return isas;
}

// "80,90" as [80, 90].
py::list numbers(const std::string& text) {
  py::list found;
  for (size_t at = 0; at < text.size(); at = text.find_first_of(',', at) + 1) {
    found.append(std::stoi(text.substr(at)));
    if (text.find(',', at) == std::string::npos) break;
  }
  return found;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FAE_VERSION;
  info["compiler"] = compiler();
  info["flags"] = FAE_CXX_FLAGS;
  py::list isas;
  for (const cpu::Isa isa : compiled_isas()) isas.append(cpu::name_of(isa));
  info["isas"] = isas;
  info["cuda"] = FAE_CUDA_ARCHS[0] != '\0';
  info["cuda_archs"] = numbers(FAE_CUDA_ARCHS);
  info["cuda_head_dims"] = numbers(FAE_CUDA_HEAD_DIMS);
  return info;
}

py::list cpu_isas() {
  py::list names;
  for (const cpu::Isa isa : cpu::available_isas()) names.append(cpu::name_of(isa));
  return names;
}

py::list variants() {
  py::list rows;
  for (const cpu::Isa isa : compiled_isas()) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
      py::dict row;
      row["isa"] = cpu::name_of(isa);
      row["dtype"] = name_of(dtype);
      row["kernel"] = cpu::kernels_for(isa, dtype).info.name;
      rows.append(row);
    }
  }
  return rows;
}

cpu::Isa isa_named(const py::object& name) {
  if (name.is_none()) return cpu::active_isa();
  const auto wanted = name.cast<std::string>();
  for (const cpu::Isa isa : cpu::available_isas()) {
    if (wanted == cpu::name_of(isa)) return isa;
  }
  throw py::value_error("isa is '" + wanted + "', which this processor or this build does not have");
}

template <class FromDict>
py::object validate_call(const py::dict& desc) {
  const FromDict described(desc);
  const auto error = validate(described.call());
  if (!error) return py::none();
  return py::make_tuple(kind_name(error->kind), error->text);
}

py::dict plan_call(const py::dict& desc, const py::object& isa, int threads, bool backward, int64_t block_q,
                   int64_t block_kv, int64_t splits, bool batch_invariant) {
  const CallFromDict described(desc);
  if (const auto error = validate(described.call())) raise(*error);
  const Problem problem = make_problem(described.call());
  const cpu::Advice advice{block_q, block_kv, splits, batch_invariant};
  const cpu::Plan plan = backward ? cpu::plan_backward(problem, isa_named(isa), threads, advice)
                                  : cpu::plan_forward(problem, isa_named(isa), threads, advice);
  py::dict result;
  result["isa"] = cpu::name_of(plan.isa);
  result["kernel"] = plan.kernel;
  result["register_tile"] = py::make_tuple(plan.register_rows, plan.register_cols);
  result["block_q"] = plan.block_q;
  result["block_kv"] = plan.block_kv;
  result["tasks"] = plan.tasks;
  result["chunks"] = plan.chunks;
  result["packs_keys"] = !plan.direct;
  result["splits"] = plan.splits;
  result["threads"] = plan.threads;
  result["worker_bytes"] = plan.worker_bytes;
  result["shared_bytes"] = plan.shared_bytes;
  result["workspace_bytes"] = plan.workspace_bytes();
  result["flops"] = plan.flops;
  result["bytes"] = plan.bytes;
  return result;
}

py::dict explain_call(const py::dict& desc, const py::object& isa, int threads, bool backward,
                      int64_t block_q, int64_t block_kv, int64_t splits, bool batch_invariant) {
  py::dict result;
  result["error"] = validate_call<CallFromDict>(desc);
  result["plan"] =
      result["error"].is_none()
          ? py::object(plan_call(desc, isa, threads, backward, block_q, block_kv, splits, batch_invariant))
          : py::none();
  return result;
}

void flash_attention(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                     bool causal, const py::object& scale) {
  const ArrayArgument q_array("q", q, Access::kRead);
  const ArrayArgument k_array("k", k, Access::kRead);
  const ArrayArgument v_array("v", v, Access::kRead);
  const ArrayArgument out_array("out", out, Access::kWrite);
  CallDesc call;
  call.q = q_array.desc();
  call.k = k_array.desc();
  call.v = v_array.desc();
  call.out = out_array.desc();
  call.causal = causal ? Causal::kBottomRight : Causal::kNone;
  if (!scale.is_none()) {
    if (!PyNumber_Check(scale.ptr())) {
      throw py::type_error("scale is a " + std::string(Py_TYPE(scale.ptr())->tp_name) +
                           ", expected a number or None");
    }
    call.scale = double(py::float_(scale));
  }
  if (const auto error = validate(call)) raise(*error);

  ForwardCall forward;
  forward.problem = make_problem(call);
  forward.out = attention_view(call.out, call.layout);
  const cpu::Isa isa = cpu::active_isa();

  const py::gil_scoped_release released;
  const cpu::Executor executor = cpu::std_executor(std::max(1, int(std::thread::hardware_concurrency())));
  cpu::forward(forward, cpu::plan_forward(forward.problem, isa, executor.threads), executor);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of flash_attn_ext: introspection, and attention on NumPy, buffer and DLPack arrays.";
  m.def("build_info", &build_info,
        "version, compiler, flags, isas (compiled in), cuda, cuda_archs and cuda_head_dims, as a dict.");
  m.def("cpu_isas", &cpu_isas,
        "Names of the instruction sets that this build and this processor share, best first.");
  m.def("variants", &variants, "One dict (isa, dtype, kernel) per compiled kernel.");
  m.def(
      "active_isa", [] { return cpu::name_of(cpu::active_isa()); },
      "The instruction set that calls use now: the best one, or FLASH_ATTN_EXT_CPU_ISA.");
  m.def("validate", &validate_call<CallFromDict>, py::arg("desc"),
        "None if the described call is legal, else (kind, text); kind is 'value', 'type', "
        "'not_implemented' or 'runtime'.");
  m.def("validate_cache", &validate_call<CacheCallFromDict>, py::arg("desc"),
        "`validate` of a call on a cache of keys and values.");
  m.def("plan", &plan_call, py::arg("desc"), py::arg("isa") = py::none(), py::arg("threads") = 1,
        py::arg("backward") = false, py::arg("block_q") = 0, py::arg("block_kv") = 0, py::arg("splits") = 0,
        py::arg("batch_invariant") = false,
        "What the described call would run, as a dict; raises if it is not legal. Blocks and splits are "
        "advice.");
  m.def("explain", &explain_call, py::arg("desc"), py::arg("isa") = py::none(), py::arg("threads") = 1,
        py::arg("backward") = false, py::arg("block_q") = 0, py::arg("block_kv") = 0, py::arg("splits") = 0,
        py::arg("batch_invariant") = false, "{'error': validate(desc), 'plan': plan(desc, ...) or None}.");
  m.def("flash_attention", &flash_attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
        py::arg("causal") = false, py::arg("scale") = py::none(),
        R"(Attention of CPU arrays, written into `out`; releases the GIL.

q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) and out (B, Sq, Hq, Dv): NumPy arrays, torch
tensors or any buffer or DLPack objects of one dtype (float16, bfloat16, float32, float64). 3-D arrays
are (S, H, D), 2-D ones (S, D). causal is aligned bottom right; scale defaults to 1 / sqrt(D).

Raises ValueError or TypeError, naming the argument, before anything is written.

Example:
    out = np.empty_like(q)
    _C.flash_attention(q, k, v, out, causal=True)
)");
}

}  // namespace fae::python
