"""GPUs: what a roofline needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One GPU and its node.

    Attributes:
        flops: peak of dense bfloat16 matrix products, per second.
        memory_bytes: as the driver reports it; the datasheets' "80 GB" is 80 GiB.
        memory_bytes_per_s: bandwidth of the GPU's memory.
        nvlink_bytes_per_s: of one GPU, in one direction; 0 without NVLink.
        pcie_bytes_per_s: of one GPU, in one direction.
        nic_bytes_per_s: network of the node, in one direction, divided by its GPUs.
        gpus_per_node: joined by NVLink, or by PCIe without it.
    """

    name: str
    flops: float
    memory_bytes: int
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    pcie_bytes_per_s: float
    nic_bytes_per_s: float
    gpus_per_node: int

    @property
    def link_bytes_per_s(self) -> float:
        """Between two GPUs of a node, in one direction."""
        return self.nvlink_bytes_per_s or self.pcie_bytes_per_s


_MIB = 2**20
_PCIE_4_BYTES_PER_S = 32e9  # x16, PCI-SIG
_PCIE_5_BYTES_PER_S = 64e9

_KNOWN = {
    hardware.name: hardware
    for hardware in (
        # NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s both
        # ways. NIC: DGX A100 datasheet, 8 x 200 Gb/s.
        Hardware(
            name="a100-80gb",
            flops=312e12,
            memory_bytes=81_920 * _MIB,
            memory_bytes_per_s=2.039e12,
            nvlink_bytes_per_s=300e9,
            pcie_bytes_per_s=_PCIE_4_BYTES_PER_S,
            nic_bytes_per_s=25e9,
            gpus_per_node=8,
        ),
        # NVIDIA H100 Tensor Core GPU datasheet (SXM): 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s
        # both ways. NIC: DGX H100 datasheet, 8 x 400 Gb/s.
        Hardware(
            name="h100-80gb",
            flops=989.5e12,
            memory_bytes=81_559 * _MIB,
            memory_bytes_per_s=3.35e12,
            nvlink_bytes_per_s=450e9,
            pcie_bytes_per_s=_PCIE_5_BYTES_PER_S,
            nic_bytes_per_s=50e9,
            gpus_per_node=8,
        ),
        # NVIDIA H200 Tensor Core GPU datasheet (SXM): as H100, with 4.8 TB/s. NIC: DGX H200 datasheet.
        Hardware(
            name="h200-141gb",
            flops=989.5e12,
            memory_bytes=143_771 * _MIB,
            memory_bytes_per_s=4.8e12,
            nvlink_bytes_per_s=450e9,
            pcie_bytes_per_s=_PCIE_5_BYTES_PER_S,
            nic_bytes_per_s=50e9,
            gpus_per_node=8,
        ),
        # NVIDIA HGX B200 datasheet: 8 GPUs with 36 PFLOPS with sparsity, 64 TB/s, NVLink 1.8 TB/s each both
        # ways. NIC: DGX B200 datasheet, 8 x 400 Gb/s.
        Hardware(
            name="b200-192gb",
            flops=2250e12,
            memory_bytes=183_359 * _MIB,
            memory_bytes_per_s=8e12,
            nvlink_bytes_per_s=900e9,
            pcie_bytes_per_s=_PCIE_5_BYTES_PER_S,
            nic_bytes_per_s=50e9,
            gpus_per_node=8,
        ),
        # NVIDIA L40S datasheet: 362.05 TFLOPS, 864 GB/s, PCIe 4.0 x16, no NVLink. NIC: assumed
        # 100 Gb/s each.
        Hardware(
            name="l40s-48gb",
            flops=362.05e12,
            memory_bytes=46_068 * _MIB,
            memory_bytes_per_s=864e9,
            nvlink_bytes_per_s=0.0,
            pcie_bytes_per_s=_PCIE_4_BYTES_PER_S,
            nic_bytes_per_s=12.5e9,
            gpus_per_node=8,
        ),
        # No product: a moderate card of 24 GiB on PCIe, where nothing is known.
        Hardware(
            name="generic",
            flops=120e12,
            memory_bytes=24_576 * _MIB,
            memory_bytes_per_s=800e9,
            nvlink_bytes_per_s=0.0,
            pcie_bytes_per_s=_PCIE_4_BYTES_PER_S,
            nic_bytes_per_s=12.5e9,
            gpus_per_node=8,
        ),
    )
}
_ALIASES = {name.partition("-")[0]: name for name in _KNOWN}


def hardware_named(name: str) -> Hardware:
    """A GPU by its name (`h100-80gb`) or its family's (`h100`). Raises SpecError that lists them."""
    found = _KNOWN.get(_ALIASES.get(name.lower(), name.lower()))
    if found is None:
        raise SpecError(file="hardware", path="", value=name, allowed=f"known: {', '.join(_KNOWN)}")
    return found
