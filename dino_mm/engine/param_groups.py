"""Optimizer groups: learning rate and weight decay by name, independently of each other."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmdet.registry import OPTIMIZERS
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Adam, AdamW, Optimizer

from dino_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS
from dino_mm.settings import SettingError

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ParamGroupConstructor(DefaultOptimWrapperConstructor):
    """Builds the optimizer with one parameter group for each pair of learning rate and weight decay.

    ``paramwise_cfg`` is written as for mmengine's constructor, and takes:

    - ``custom_keys``: part of a parameter's name -> ``dict(lr_mult=..., decay_mult=...)``, either or both. The longest
      matching key **that states it** gives the multiplier.
    - ``norm_decay_mult``: ``decay_mult`` of batch, instance, group and layer norms (subclasses included) for which no
      key states one.

    So ``custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0`` gives the backbone's norms a tenth of the
    learning rate and no weight decay; mmengine's constructor applies no other rule to a parameter that a key matches,
    and makes a group of every parameter, which fused optimizers and logs suffer from. Frozen parameters are left out.

    Adam and AdamW of parameters on GPUs are ``fused``: one kernel in place of a dozen, each over many parameters. Where
    ``optimizer`` states ``fused`` or ``foreach``, that holds.

    Args:
        optim_wrapper_cfg: The optimizer wrapper's config; its ``optimizer`` states ``lr`` and ``weight_decay``.
        paramwise_cfg: As above; None makes one group of all parameters, frozen ones included.

    Raises:
        ValueError: ``paramwise_cfg`` has another option, a key matches no parameter, or ``optimizer`` lacks ``lr`` or
            ``weight_decay``.
        SettingError: There is no such optimizer.
    """

    def _validate_cfg(self) -> None:
        """Refuse options without effect."""
        if self.paramwise_cfg and (self.base_lr is None or self.base_wd is None):
            raise ValueError(
                'State `lr` and `weight_decay` in `optim_wrapper.optimizer`: `paramwise_cfg` multiplies them.'
            )
        super()._validate_cfg()
        _check_options('paramwise_cfg', self.paramwise_cfg, ('custom_keys', 'norm_decay_mult'))
        for key, options in self._custom_keys.items():
            _check_options(f'paramwise_cfg.custom_keys[{key!r}]', options, ('lr_mult', 'decay_mult'))

    @property
    def _custom_keys(self) -> Mapping[str, Mapping[str, float]]:
        return self.paramwise_cfg.get('custom_keys', {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper; on GPUs Adam and AdamW are fused, unless the config says otherwise."""
        kind = self.optimizer_cfg['type']
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            if isinstance(kind, str) and registry.get(kind) is None:  # mmengine would inspect the signature of None
                raise SettingError(f'There is no optimizer {kind}. Correct `optim_wrapper.optimizer.type`.')
        is_adam = kind in ('Adam', 'AdamW', Adam, AdamW)
        if not is_adam or 'fused' in self.optimizer_cfg or 'foreach' in self.optimizer_cfg:
            return super().__call__(model)
        self.optimizer_cfg['fused'] = _is_on_gpus(model) or None  # of False, torch makes a loop over parameters
        wrapper = super().__call__(model)
        wrapper.optimizer.register_load_state_dict_pre_hook(_keep_fused)
        wrapper.optimizer.register_load_state_dict_post_hook(_keep_layout)
        return wrapper

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Append the groups of ``module`` to ``params``, in the order of their first parameters.

        Args:
            params: The list of groups.
            module: The model.
            prefix: Comes before the parameters' names.
            is_dcn_module: mmengine's; without effect.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        names, num_frozen = [], 0
        for name, parameter, is_norm in _named_parameters(module, prefix):
            names.append(name)
            if not parameter.requires_grad:
                num_frozen += 1
                continue
            norm_mult = self.paramwise_cfg.get('norm_decay_mult', 1.0) if is_norm else 1.0
            lr = self.base_lr * self._multiplier(name, 'lr_mult', 1.0)
            weight_decay = self.base_wd * self._multiplier(name, 'decay_mult', norm_mult)
            groups.setdefault((lr, weight_decay), []).append(parameter)
        self._check_keys_match(names)
        for (lr, weight_decay), members in groups.items():
            params.append(dict(params=members, lr=lr, weight_decay=weight_decay))
            print_log(f'{len(members)} parameters with lr {lr:g} and weight decay {weight_decay:g}', logger='current')
        print_log(f'{num_frozen} frozen parameters are left out of the optimizer', logger='current')

    def _multiplier(self, name: str, option: str, default: float) -> float:
        """``option`` of the longest key in ``name`` that states it; of equally long ones the first by alphabet."""
        keys = [key for key, options in self._custom_keys.items() if key in name and option in options]
        return self._custom_keys[min(keys, key=lambda key: (-len(key), key))][option] if keys else default

    def _check_keys_match(self, names: list[str]) -> None:
        for key in self._custom_keys:
            if not any(key in name for name in names):
                parts = sorted({name.split('.')[0] for name in names})
                raise ValueError(
                    f"`optim_wrapper.paramwise_cfg.custom_keys` has the key {key!r}, which is in no parameter's name. "
                    f'Correct or remove it. Names begin with: {", ".join(parts)}.'
                )


def _is_on_gpus(model: nn.Module) -> bool:
    return all(parameter.is_cuda for parameter in model.parameters())


def _keep_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` to load, but ``fused`` as it is here: that is of the machine that wrote it."""
    groups = [dict(group, fused=optimizer.defaults['fused']) for group in state['param_groups']]
    return dict(state, param_groups=groups)


def _keep_layout(optimizer: Optimizer) -> None:
    """Lay what was loaded out as the parameters are, channels last or not: fused kernels demand it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _named_parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each parameter once, under its first name, and whether it is a norm layer's."""
    seen: set[nn.Parameter] = set()
    for path, part in module.named_modules(prefix=prefix):
        for name, parameter in part.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f'{path}.{name}' if path else name, parameter, isinstance(part, NORMS)


def _check_options(where: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(
                f'`optim_wrapper.{where}` has an option `{option}`, which ParamGroupConstructor does not have. '
                f'It takes: {", ".join(known)}.'
            )
