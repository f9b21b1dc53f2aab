"""What PyTorch has for the same products: dense bfloat16 and its own int4."""

__all__ = ["GROUP_SIZES", "PEERS", "TorchPeers", "dense_linear", "int4_linear", "missing_int4", "pack_int4"]

PEERS = ("torch_bf16", "torch_int4")
GROUP_SIZES = (32, 64, 128, 256)  # what _weight_int4pack_mm_for_cpu takes


def missing_int4(torch):
    """Why this torch has no int4 product, or None."""
    operators = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    if not all(hasattr(torch.ops.aten, name) for name in operators):
        return f"torch {torch.__version__} has no {operators[1]}"
    return None


def pack_int4(torch, codes):
    """What the int4 product takes, from int32 codes ``[N, K]`` in 0..15."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def int4_linear(torch, packed, scales_and_zeros, group_size):
    """The function from bfloat16 ``[rows, K]`` to ``[rows, N]`` with the weight ``scale * (code - 8) + zero``.

    ``scales_and_zeros`` is bfloat16 ``[K/group_size, N, 2]``.
    """
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x, packed, group_size, scales_and_zeros)


def dense_linear(torch, weight):
    """The function from ``[rows, K]`` to ``[rows, N]`` with the weight ``[N, K]``, all of one dtype."""
    linear = torch.nn.functional.linear
    return lambda x: linear(x, weight)


class TorchPeers:
    """The peers that this installation has; made without torch, it has none and says why.

    Activations are bfloat16. An expert's rows go through one call, as there is no call for several
    experts. Each weight has several copies, as ours has several experts.

    Parameters
    ----------
    num_threads : int
    wanted : bool
        False: have none.

    Attributes
    ----------
    missing : dict of str to str
        The peers that cannot run, with the reason.
    """

    def __init__(self, num_threads, wanted=True):
        self.torch, self.missing = None, {}
        if not wanted:
            self.missing = dict.fromkeys(PEERS, "left out")
            return
        try:
            import torch
        except ImportError as error:
            self.missing = dict.fromkeys(PEERS, f"torch cannot be imported: {error}")
            return
        self.torch = torch
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        if missing := missing_int4(torch):
            self.missing["torch_int4"] = missing

    @property
    def names(self):
        """The peers that can run."""
        return [name for name in PEERS if name not in self.missing]

    def report(self):
        """The JSON object ``machine.torch``."""
        if self.torch is None:
            return {"version": None, "missing": self.missing}
        return {
            "version": self.torch.__version__,
            "cpu_capability": self.torch.backends.cpu.get_cpu_capability(),
            "mkldnn": self.torch.backends.mkldnn.is_available(),
            "threads": self.torch.get_num_threads(),
            "missing": self.missing,
        }

    @staticmethod
    def weight_bytes(name, k, n):
        """Bytes of one weight."""
        return 2 * k * n if name == "torch_bf16" else k * n * 54 // 100

    def linears(self, name, copies, k, n, group_size):
        """``copies`` functions from bfloat16 ``[rows, k]`` to ``[rows, n]``, each with a weight of its own."""
        if name == "torch_bf16":
            return self._dense(copies, k, n)
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: got {group_size}, expected one of {GROUP_SIZES}")
        return self._int4(copies, k, n, group_size)

    def _dense(self, copies, k, n):
        weight = self.torch.randn(n, k).mul_(0.02).bfloat16()
        return [dense_linear(self.torch, weight.clone()) for _ in range(copies)]

    def _int4(self, copies, k, n, group_size):
        torch = self.torch
        packed = pack_int4(torch, torch.randint(0, 16, (n, k), dtype=torch.int32))
        scales_and_zeros = torch.rand(k // group_size, n, 2).mul_(0.02).bfloat16()
        return [int4_linear(torch, packed.clone(), scales_and_zeros.clone(), group_size) for _ in range(copies)]

    def activations(self, rows, k):
        """Normal bfloat16 ``[rows, k]``."""
        return self.torch.randn(rows, k).bfloat16()

    def gemm_call(self, linears, experts_per_call, rows, k):
        """``call(i)``: ``rows`` rows through each of the next ``experts_per_call`` weights."""
        blocks = self.activations(experts_per_call * rows, k).split(rows)

        def call(i):
            first = i * experts_per_call
            for j, block in enumerate(blocks):
                linears[(first + j) % len(linears)](block)

        return call

    def layer_call(self, gate_up, down, rows_of_experts, hidden, intermediate):
        """``call(i)``: the products alone of routing i, for rows gathered beforehand.

        Routing, gathering, the activation function and the combination are left out, in torch's favour.

        Parameters
        ----------
        gate_up, down : lists of functions
        rows_of_experts : list of dict of int to int
            For each routing, the rows of every expert that it hits.
        """
        most = max(max(rows.values()) for rows in rows_of_experts)
        x, h = self.activations(most, hidden), self.activations(most, intermediate)
        plans = [
            [(gate_up[e % len(gate_up)], x[:m], down[e % len(down)], h[:m]) for e, m in rows.items()]
            for rows in rows_of_experts
        ]

        def call(i):
            for up, rows_in, out, rows_between in plans[i % len(plans)]:
                up(rows_in)
                out(rows_between)

        return call
