"""What a piece of work costs: operator calls, points at which the host waits, memory, time; and processes to compare.

Counts do not depend on the machine, so tests can hold them; times do, and are only ever compared side by side.
"""

import ctypes
import gc
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

#: Operators whose result, or its shape, the host must know: with a GPU it waits for all work that was queued before.
WAITING_OPERATORS = frozenset(
    {
        '_local_scalar_dense',
        'item',
        'is_nonzero',
        'nonzero',
        'masked_select',
        'unique_dim',
        'unique_consecutive',
        'unique_dim_consecutive',
        '_unique',
        '_unique2',
        'equal',
    }
)
#: Operators that wait where an index is a boolean mask.
INDEXING_OPERATORS = frozenset({'index', 'index_put', 'index_put_', '_index_put_impl_'})
#: Methods that copy a tensor to the host. On a CPU no operator shows it, so the calls themselves are counted.
HOST_METHODS = ('cpu', 'numpy', 'tolist')
#: What makes a tensor of the host's numbers; on a GPU, by a copy from memory that is not pinned.
CONSTRUCTORS = ((torch, 'tensor'), (torch, 'as_tensor'), (Tensor, 'new_tensor'))
#: Operators that copy from one device to another.
COPYING_OPERATORS = frozenset({'_to_copy', 'copy_'})
#: The kind of synchronisation that ``one_hot`` counts as: on a CPU it looks at its labels, on a GPU it does not.
LABEL_CHECK = 'label check of a CPU'
#: What copies in one of ``CONSTRUCTORS`` belong to.
CONSTRUCTION = 'construction'
_INNER_CODE = (__file__, f'{Path(torch.__file__).parent}/')
_CPU = torch.device('cpu')


class OperatorCounter(TorchDispatchMode):
    """Counts, while active, operator calls and host synchronisations, those of a backward pass included.

    A synchronisation is a call of ``WAITING_OPERATORS``, indexing with a boolean mask, a copy to the host, or one from
    the host unless it is ``non_blocking``: that is what ``torch.cuda.set_sync_debug_mode`` finds. ``CONSTRUCTORS`` that
    are told a device copy from the host. Other copies are seen on a GPU as operators; on a CPU, whose memory stands for
    both, as calls of ``Tensor.cpu``, ``numpy`` and ``tolist``, where ``tensor.cpu().numpy()`` is one copy, and of
    ``Tensor.to`` with a tensor that comes from there, from NumPy, or from a constructor without a device. What a CPU
    does and a GPU does not, ``one_hot``'s look at its labels, in mmdet's ``FocalLoss``, is counted as ``LABEL_CHECK``.

    Args:
        device: Where the work runs.

    Attributes:
        calls: Calls of each operator.
        waits: Synchronisations of each kind.
        places: Where in the code, 'folder/file.py:line', those are that a GPU makes.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        super().__init__()
        self.device = device
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._made_by_host = WeakIdKeyDictionary()
        self._fetched: Tensor | None = None
        self._inside: str | None = None

    @property
    def num_calls(self) -> int:
        """Operator calls."""
        return self.calls.total()

    @property
    def num_waits(self) -> int:
        """Synchronisations, without those that only a CPU makes."""
        return self.waits.total() - self.waits[LABEL_CHECK]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count and run one operator."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in WAITING_OPERATORS and not self._is_on_host(args[0]):
            self._note(LABEL_CHECK if self._inside == LABEL_CHECK else name)
        elif name in INDEXING_OPERATORS and _has_mask(args[1]):
            self._note(f'{name} with a mask')
        elif name in COPYING_OPERATORS and self._inside != CONSTRUCTION:
            self._note_copy(result, args, kwargs)
        return result

    def __enter__(self) -> 'OperatorCounter':
        """Start to count."""
        self._patches = ExitStack()
        self._watch(self._note_constructor, *CONSTRUCTORS)
        if self.device.type == 'cpu':
            self._watch(self._note_fetching, *((Tensor, name) for name in HOST_METHODS))
            self._watch(self._note_sending, (Tensor, 'to'))
            self._watch(self._note_array, (torch, 'from_numpy'))
        self._patches.enter_context(mock.patch.object(F, 'one_hot', self._telling(F.one_hot, LABEL_CHECK)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        super().__exit__(*error)
        self._patches.close()

    def _note(self, kind: str) -> None:
        """Count a synchronisation."""
        self.waits[kind] += 1
        if kind != LABEL_CHECK:
            self.places[_place()] += 1

    def _watch(self, note: Callable[..., None], *functions: tuple[Any, str]) -> None:
        """Have ``note`` called after each call of the functions, with their name, arguments and result."""

        def watching(function: Callable, name: str) -> Callable:
            told = self._telling(function, CONSTRUCTION) if note == self._note_constructor else function

            def watched(*args: Any, **kwargs: Any) -> Any:
                result = told(*args, **kwargs)
                if self._inside is None:
                    note(name, args, kwargs, result)
                return result

            return watched

        for owner, name in functions:
            kind = f'{owner.__name__}.{name}'
            self._patches.enter_context(mock.patch.object(owner, name, watching(getattr(owner, name), kind)))

    def _note_constructor(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        like, data, *options = args if name == 'Tensor.new_tensor' else (None, *args)
        options += kwargs.values()
        for_device = like is not None and like not in self._made_by_host
        for_device |= any(isinstance(option, torch.device | str) for option in options)
        if isinstance(data, Tensor):
            return
        if for_device and result.device.type == self.device.type:
            self._note(name)
        else:
            self._made_by_host[result] = True

    def _note_array(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        self._made_by_host[result] = True

    def _note_fetching(self, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        if name == 'Tensor.cpu' or not self._is_on_host(args[0]):
            self._note(name)
        self._fetched = result if isinstance(result, Tensor) else None

    def _note_sending(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        tensor, *options = args
        options += kwargs.values()
        if not self._is_on_host(tensor) or not any(isinstance(o, torch.device | str | Tensor) for o in options):
            return
        if not any(option is True for option in options):  # non_blocking
            self._note(name)
        self._made_by_host.pop(result, None)  # on a CPU it is the same tensor
        self._fetched = None

    def _is_on_host(self, tensor: Tensor) -> bool:
        if self.device.type != 'cpu':
            return tensor.is_cpu
        return tensor is self._fetched or tensor in self._made_by_host

    def _note_copy(self, result: Any, args: tuple, kwargs: dict) -> None:
        """Count a copy from one side to the other; there is none on a CPU."""
        sources = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if result.is_cpu and not all(source.is_cpu for source in sources):
            self._note('copy to the host')
        elif not result.is_cpu and sources[-1].is_cpu and not (kwargs.get('non_blocking') or True in args[2:]):
            self._note('copy from the host')

    def _telling(self, function: Callable, kind: str) -> Callable:
        """``function``, during which the counter knows what is done."""

        def told(*args: Any, **kwargs: Any) -> Any:
            outer, self._inside = self._inside, self._inside or kind
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = outer

        return told


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _place() -> str:
    """Who runs: the innermost line of code that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_INNER_CODE):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f'{path.parent.name}/{path.name}:{frame.f_lineno}'


class PeakMemory(AbstractContextManager):
    """Highest memory use of what runs within it, above what was in use before.

    On a GPU torch's allocations; on a CPU the process's resident set (Linux only), so nothing else may run in it.

    Attributes:
        bytes: The result; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> 'PeakMemory':
        """Give back what is free, and start."""
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR_REFS.write_text('5')  # the peak becomes what is resident now
            self._before = _resident('VmRSS')
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        if self.device.type == 'cuda':
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif _STATUS.exists():
            self.bytes = _resident('VmHWM') - self._before


_STATUS = Path('/proc/self/status')
_CLEAR_REFS = Path('/proc/self/clear_refs')


def _resident(field: str) -> int:
    """``VmRSS``, the resident set now, or ``VmHWM``, its peak; bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f'{field}:'))
    return int(line.split()[1]) * 1024


@contextmanager
def stopwatch(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Write to ``seconds[name]`` how long its block takes, a GPU's queued work included."""
    _finish(device)
    start = time.perf_counter()
    yield
    _finish(device)
    seconds[name] = time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


class Worker:
    """An object in a process of its own, with memory and threads of its own; it sleeps between calls.

    Args:
        build: Makes the object, in the process.
        args: Arguments of ``build``.
    """

    def __init__(self, build: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context('spawn')
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, build, args), daemon=True)
        self._process.start()
        far_end.close()

    def __call__(self, method: str, *args: Any) -> Any:
        """Call a method of the object and wait for its result.

        Raises:
            RuntimeError: The object could not be made, the method failed, or the process ended; tells the cause.
        """
        try:
            self._connection.send((method, args))
            result, error = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(
                f'The process that measures ended with status {self._process.exitcode}: out of memory? '
                'Measure a smaller `--size` or `--batch`.'
            ) from None
        if error is not None:
            raise RuntimeError(error)
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Any, build: Callable[..., Any], args: tuple) -> None:
    """Answer calls until the other end closes; the first failure is the answer to all that follows."""
    served, broken = None, None
    try:
        served = build(*args)
    except Exception:
        broken = traceback.format_exc()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        result = None
        if broken is None:
            try:
                result = getattr(served, method)(*arguments)
            except Exception:
                broken = traceback.format_exc()
        connection.send((result, broken))
