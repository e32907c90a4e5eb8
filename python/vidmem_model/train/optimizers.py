"""Assign weights to optimizers.

The default is AdamW with weight decay. The dict TRAINED_AS of a module's class gives other roles to the names of
parameters or child modules; the dict of a child takes precedence:

- "muon": matrices are trained with Muon, if `muon_lr` is set;
- "adamw": AdamW, inside of a "muon" module;
- "no_decay": AdamW without weight decay, as for all vectors;
- "fitted": AdamW with `TrainConfig.fitted_lr`, for weights that a linear start initialises.
"""

from __future__ import annotations

import torch
from torch import nn

from .config import TrainConfig
from .muon import Muon


def roles(module: nn.Module, prefix: str = "", role: str = "adamw") -> dict[str, str]:
    """Map the name of every parameter of a module to its role.

    Args:
        module: The module.
        prefix: Prefix of the names.
        role: Role of parameters that no TRAINED_AS names.

    Returns:
        The role of each parameter by name.
    """
    declared = getattr(module, "TRAINED_AS", {})
    found = {prefix + name: declared.get(name, role) for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        found |= roles(child, f"{prefix}{name}.", declared.get(name, role))
    return found


def optimizers(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Make AdamW, and Muon if `muon_lr` is set, for the weights that require a gradient.

    Args:
        model: The model; its weights may be sharded.
        config: Learning rates and weight decay.
        dtype: Dtype of Muon's matrix products.

    Returns:
        The optimizers; the entry "peak" of a parameter group is its peak learning rate.

    Raises:
        ValueError: No weight requires a gradient.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("fit: the model must have weights that require a gradient, got none")
    role = roles(model)
    matrices = {n: p for n, p in trained.items() if config.muon_lr and role[n] == "muon" and p.ndim == 2}
    rest = {n: p for n, p in trained.items() if n not in matrices}
    # Vectors are norms and biases, which have no weight decay.
    decays = {n: p.ndim >= 2 and role[n] != "no_decay" for n, p in rest.items()}
    shares = {n: config.fitted_lr if role[n] == "fitted" else 1.0 for n in rest}
    groups = [
        {
            "params": [p for n, p in rest.items() if (shares[n], decays[n]) == (share, decay)],
            "weight_decay": config.weight_decay if decay else 0.0,
            "lr": config.lr * share,
        }
        for share in sorted(set(shares.values()), reverse=True)
        for decay in (True, False)
    ]
    made = [torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), fused=True)]
    if matrices:
        made.append(Muon(matrices.values(), config.muon_lr, config.weight_decay, dtype=dtype))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made
