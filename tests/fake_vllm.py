"""The names of vLLM that the plugin imports, with as much behind them as tests of the plugin's decisions need."""

import importlib
import sys
import types

import pytest

PLUGIN = "marlin_cy.integrations.vllm"
torch = pytest.importorskip("torch", reason="PyTorch is not installed")


class Layer(torch.nn.Module):
    """A layer of vLLM: attributes as given."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class LinearBase(Layer):
    pass


class VocabParallelEmbedding(Layer):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class RoutedExperts(Layer):
    def _map_global_expert_id_to_local_expert_id(self, expert):
        return expert


class FusedMoEMethodBase:
    def __init__(self, moe):
        self.moe = moe


class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
    pass


class UnquantizedLinearMethod:
    """vLLM's products of unquantised weights, by PyTorch."""

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.weight, bias)


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    pass


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class WeightsMapper:
    pass


def install(monkeypatch, additional_config=None, load_format="auto", has_own_products=False):
    """Put the names into ``sys.modules``; returns the plugin's module ``config``, imported anew.

    ``has_own_products``: as where vLLM has products of unquantised weights.
    """
    layers_by_name = {}
    current = types.SimpleNamespace(
        additional_config=additional_config or {},
        load_config=types.SimpleNamespace(load_format=load_format),
        aux_output_config=types.SimpleNamespace(enable_return_routed_experts=False),
        compilation_config=types.SimpleNamespace(static_forward_context=layers_by_name),
    )
    context = types.SimpleNamespace(no_compile_layers=layers_by_name)
    layers = "vllm.model_executor.layers"
    contents = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: current},
        "vllm.forward_context": {"get_forward_context": lambda: context},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.fused_moe": {
            "FusedMoEMethodBase": FusedMoEMethodBase,
            "RoutedExperts": RoutedExperts,
            "UnquantizedFusedMoEMethod": UnquantizedFusedMoEMethod,
        },
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {"register_quantization_config": lambda name: lambda chosen: chosen},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {
            "ParallelLMHead": ParallelLMHead,
            "UnquantizedEmbeddingMethod": UnquantizedEmbeddingMethod,
            "VocabParallelEmbedding": VocabParallelEmbedding,
        },
        "vllm.model_executor.models": {},
        "vllm.platforms": {"current_platform": types.SimpleNamespace(is_zen_cpu=lambda: False)},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {"get_safetensors_params_metadata": lambda *args, **options: {}},
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    parts = ("config", "dense", "linear", "experts", "tensors", "expert_weights", "packed_folder")
    for part in parts:
        monkeypatch.delitem(sys.modules, f"{PLUGIN}.{part}", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_own_products)
    # A process can define operators only once.
    operators = importlib.import_module(f"{PLUGIN}.operators")
    monkeypatch.setattr(operators, "get_current_vllm_config", lambda: current)
    monkeypatch.setattr(operators, "get_forward_context", lambda: context)
    config = importlib.import_module(f"{PLUGIN}.config")
    for part in parts:
        monkeypatch.setitem(sys.modules, f"{PLUGIN}.{part}", sys.modules[f"{PLUGIN}.{part}"])
    return config
