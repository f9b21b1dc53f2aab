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


class CPUAttentionBackend:
    pass


class CPUAttentionBackendImpl:
    """vLLM's attention of one layer, as far as it is read here."""

    def __init__(self, **attributes):
        self.__dict__ |= {"scale": 0.25, "alibi_slopes": None, "sinks": None, "logits_soft_cap": 0} | attributes


class Attention(Layer):
    """An attention layer of vLLM."""

    def __init__(self, **attributes):
        plain = {
            "attn_backend": CPUAttentionBackend,
            "impl": CPUAttentionBackendImpl(),
            "attn_type": "decoder",
            "kv_sharing_target_layer_name": None,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_size": 16,
            "head_size_v": 16,
            "sliding_window": None,
            "kv_cache_dtype": "auto",
            "kv_cache_torch_dtype": torch.bfloat16,
        }
        super().__init__(**plain | attributes)


class AttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec = kv_cache_spec


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class WeightsMapper:
    pass


def install(monkeypatch, additional_config=None, load_format="auto", has_own_kernels=False):
    """Put the names into ``sys.modules``; returns the plugin's module ``config``, imported anew.

    ``has_own_kernels``: as where vLLM has fast kernels of its own.
    """
    layers_by_name = {}
    current = types.SimpleNamespace(
        additional_config=additional_config or {},
        load_config=types.SimpleNamespace(load_format=load_format),
        aux_output_config=types.SimpleNamespace(enable_return_routed_experts=False),
        compilation_config=types.SimpleNamespace(static_forward_context=layers_by_name),
        cache_config=types.SimpleNamespace(block_size=128),
        model_config=types.SimpleNamespace(is_hybrid=False, is_mm_prefix_lm=False),
        speculative_config=None,
        kv_transfer_config=None,
    )
    context = types.SimpleNamespace(no_compile_layers=layers_by_name)
    layers = "vllm.model_executor.layers"
    contents = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: current},
        "vllm.forward_context": {"get_forward_context": lambda: context},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.attention": {"Attention": Attention},
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
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionImpl": object,
            "AttentionMetadataBuilder": AttentionMetadataBuilder,
            "AttentionType": types.SimpleNamespace(DECODER="decoder"),
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackend": CPUAttentionBackend,
            "CPUAttentionBackendImpl": CPUAttentionBackendImpl,
        },
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {"get_safetensors_params_metadata": lambda *args, **options: {}},
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    parts = ("attention", "config", "dense", "linear", "experts", "tensors", "expert_weights", "packed_folder")
    for part in parts:
        monkeypatch.delitem(sys.modules, f"{PLUGIN}.{part}", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_own_kernels)
    # A process can define operators only once.
    operators = importlib.import_module(f"{PLUGIN}.operators")
    monkeypatch.setattr(operators, "get_current_vllm_config", lambda: current)
    monkeypatch.setattr(operators, "get_forward_context", lambda: context)
    config = importlib.import_module(f"{PLUGIN}.config")
    for part in parts:
        monkeypatch.setitem(sys.modules, f"{PLUGIN}.{part}", sys.modules[f"{PLUGIN}.{part}"])
    return config
