"""Which optimizer takes which weights.

A module says how its weights are trained where that is not AdamW with weight decay: its class's dict TRAINED_AS has a
role for the name of a parameter or of a child, whose own dict comes first:

- "muon": matrices go to Muon, if it has a learning rate;
- "adamw": no, they do not;
- "no_decay": AdamW without weight decay. Vectors never have any;
- "fitted": AdamW with `TrainConfig.fitted_lr`, for what a linear start sets or fits to what it has set.
"""

from __future__ import annotations

import torch
from torch import nn

from .config import TrainConfig
from .muon import Muon


def roles(module: nn.Module, prefix: str = "", role: str = "adamw") -> dict[str, str]:
    """The role of every parameter of a module, by its name.

    Args:
        module: whose parameters.
        prefix: of the names.
        role: of what no module says anything about.
    """
    declared = getattr(module, "TRAINED_AS", {})
    found = {prefix + name: declared.get(name, role) for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        found |= roles(child, f"{prefix}{name}.", declared.get(name, role))
    return found


def optimizers(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Make AdamW, and Muon if it has a learning rate, for the weights that require a gradient.

    Args:
        model: its weights, sharded or not.
        config: learning rates and weight decay.
        dtype: of Muon's products.

    Returns:
        The optimizers; the "peak" of a group is its learning rate.

    Raises:
        ValueError: no weight requires a gradient.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("fit: the model must have weights that require a gradient, got none")
    role = roles(model)
    matrices = {n: p for n, p in trained.items() if config.muon_lr and role[n] == "muon" and p.ndim == 2}
    rest = {n: p for n, p in trained.items() if n not in matrices}
    # Vectors are norms and biases.
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
