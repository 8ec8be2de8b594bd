"""Checkpoints of a training that are whole or absent, with one that is whole at any moment."""

import os
import time
from collections import deque
from typing import Any

import mmengine.hooks
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from dino_mm.registry import HOOKS

from ..checkpoints.errors import CheckpointError
from ..checkpoints.finite import first_non_finite
from .safe_files import WHOLE_FILES, remove_partial, write_whole

#: Entry of a checkpoint's ``meta``: when it was written, in seconds since 1970. mmengine's own is local time.
WRITTEN = 'written_at'


@HOOKS.register_module()
class CheckpointHook(mmengine.hooks.CheckpointHook):
    """mmengine's hook, with the same arguments, that never leaves a training without a whole checkpoint.

    A checkpoint appears under its name when all of it is on the disk. Only then is ``last_checkpoint`` written, with a
    path relative to the work directory, and only then are older checkpoints deleted. A checkpoint that cannot be
    written is tried again at the next interval; the second failure in a row ends the training, as one at its end does.

    Raises:
        CheckpointError: The weights are not finite, or checkpoints cannot be written.
    """

    backend_args: dict | None
    _newest = 0.0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take over the time of the checkpoint that the training goes on from."""
        if runner._resume:
            self._newest = max(self._newest, float(checkpoint['meta'].get(WRITTEN, 0)))

    def before_train(self, runner: Runner) -> None:
        """Delete what an interrupted run left half written."""
        super().before_train(runner)
        self._failed_at: int | None = None
        self._whole: str | None = runner._load_from if runner._resume else None
        own_place = self.file_client_args is not None or self.backend_args is not None
        if not own_place and '://' not in str(self.out_dir):
            self.backend_args = dict(backend=WHOLE_FILES)
            if is_main_process():
                for folder in {str(self.out_dir), runner.work_dir}:
                    for path in remove_partial(folder):
                        runner.logger.info(f'Deleted {path}, which an interrupted run left half written.')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite, and note the time."""
        for weights in (checkpoint['state_dict'], checkpoint.get('ema_state_dict', {})):
            name = first_non_finite(weights)
            if name is not None:
                raise CheckpointError(
                    f'No checkpoint is saved at iteration {checkpoint["meta"]["iter"]}: {name!r} holds NaN or '
                    f'infinity, so the training has failed. {self._kept()} Go on with --resume and a smaller '
                    'learning rate.'
                )
        # Later checkpoints are newer, even if the clock has been set back.
        self._newest = max(time.time(), self._newest + 1e-3)
        checkpoint['meta'][WRITTEN] = self._newest

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        name, info = self.filename_tmpl.format(step), runner.message_hub.runtime_info
        path, before = self.file_backend.join_path(self.out_dir, name), dict(info)
        older = [one for one in getattr(self, 'keep_ckpt_ids', ()) if one != step]
        runner.message_hub.update_info('last_ckpt', path)
        if self.max_keep_ckpts > 0:
            # Should the run be killed before it deletes the older ones, the next run does.
            runner.message_hub.update_info('keep_ckpt_ids', [*older, step])
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
        except OSError as error:
            _restore(info, before)
            self._try_again_or_give_up(runner, step, path, error)
            return
        self.last_ckpt, self._whole, self._failed_at = path, path, None
        if is_main_process():
            self._note_last(runner)
        if self.max_keep_ckpts > 0:
            self._delete_older(runner, older, step)

    def _delete_older(self, runner: Runner, older: list[int], step: int) -> None:
        while len(older) >= self.max_keep_ckpts:
            self._delete(runner, self.filename_tmpl.format(older.pop(0)))
        self.keep_ckpt_ids = deque([*older, step], self.max_keep_ckpts)
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _note_last(self, runner: Runner) -> None:
        path, local = str(self.last_ckpt), '://' not in str(self.last_ckpt)
        try:
            text = os.path.relpath(path, runner.work_dir) if local else path
            write_whole(os.path.join(runner.work_dir, 'last_checkpoint'), text.encode())
        except OSError as error:  # --resume does without
            runner.logger.warning(f'last_checkpoint is not written ({error}); {path} itself is.')

    def _try_again_or_give_up(self, runner: Runner, step: int, path: str, error: OSError) -> None:
        problem = f'{path} is not written: {error.strerror or error}. {self._kept()}'
        last = runner.max_epochs if self.by_epoch else runner.max_iters
        again = self._failed_at not in (None, step)
        if again or step >= last or self.interval <= 0:
            why = 'the second failure in a row' if again else 'no later try'
            raise CheckpointError(f'{problem} There is {why}: free some space, then go on with --resume.')
        self._failed_at = step
        following = min((step // self.interval + 1) * self.interval, last)
        unit = 'epoch' if self.by_epoch else 'iteration'
        runner.logger.error(f'{problem} The next try is at {unit} {following}; if it fails too, the training ends.')

    def _kept(self) -> str:
        return 'There is no earlier one.' if self._whole is None else f'{self._whole} is kept.'

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Write the new best checkpoint, then delete the former one; mmengine deletes first."""
        if not self.save_best:
            return
        info = runner.message_hub.runtime_info
        before, former = dict(info), self._best()
        self._set_best(dict.fromkeys(former))  # so that mmengine has nothing to delete
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            _restore(info, before)
            self._set_best(former)
            runner.logger.error(f'The best checkpoint is not written: {error.strerror or error}. The former is kept.')
            return
        best = {key: path or former[key] for key, path in self._best().items()}
        self._set_best(best)
        for name in {os.path.basename(path) for path in former.values() if path}:
            if name not in {os.path.basename(path) for path in best.values() if path}:
                self._delete(runner, name)

    def _best(self) -> dict[str, str | None]:
        """Metric -> path of the checkpoint that is best by it; '' stands for the only metric."""
        return {'': self.best_ckpt_path} if len(self.key_indicators) == 1 else dict(self.best_ckpt_path_dict)

    def _set_best(self, paths: dict[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _delete(self, runner: Runner, name: str) -> None:
        """Delete a checkpoint of this training's folder, whichever the folder was when it was written."""
        if not is_main_process():
            return
        path = self.file_backend.join_path(self.out_dir, name)
        try:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # as deepspeed's are
                self.file_backend.rmtree(path)
        except OSError as error:
            runner.logger.warning(f'{path} can not be deleted: {error.strerror or error}.')


def _restore(info: dict, before: dict) -> None:
    info.clear()
    info.update(before)
