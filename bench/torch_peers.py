"""What PyTorch has for the same products: dense bfloat16 and its own int4."""

__all__ = ["PEERS", "TorchPeers"]

PEERS = ("torch_bf16", "torch_int4")
GROUP_SIZES = (32, 64, 128, 256)  # what _weight_int4pack_mm_for_cpu takes


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
        operators = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
        if not all(hasattr(torch.ops.aten, name) for name in operators):
            self.missing["torch_int4"] = f"torch {torch.__version__} has no {operators[1]}"

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
        linear = self.torch.nn.functional.linear
        weight = self.torch.randn(n, k).mul_(0.02).bfloat16()

        def with_weight(w):
            return lambda x: linear(x, w)

        return [with_weight(weight.clone()) for _ in range(copies)]

    def _int4(self, copies, k, n, group_size):
        torch = self.torch
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales_and_zeros = torch.rand(k // group_size, n, 2).mul_(0.02).bfloat16()

        def with_weight(w, s):
            return lambda x: multiply(x, w, group_size, s)

        return [with_weight(packed.clone(), scales_and_zeros.clone()) for _ in range(copies)]

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
