"""Hard tokens ask the training text what came next in the places most like theirs: a nearest-neighbor language model.

Every labelled token of the training text is kept as a pair: what two of the model's layers say of the text up to it
(the key), and the token that followed (the label). A hard token's prediction is then

    (1 - g) * p_model + g * p_neighbors,    p_neighbors(y) ~ sum over the k nearest keys with label y of exp(s / T)

with ``s`` the cosine of query and key. The share ``g`` depends on how near the nearest is and how much the neighbors
agree. It, and ``T``, are fitted on validation text: four numbers. Easy tokens ask nobody, as in the cascade.

Sources: kNN-LM (Khandelwal et al., arXiv 1911.00172), whose keys are a layer's feed-forward input; queries for some
tokens only, and principal components of the keys (He, Neubig and Berg-Kirkpatrick, arXiv 2109.04212).

Shape legend: N tokens, K hard tokens among them, M kept tokens, E a state's size: hidden size times layers, P a key's
size, V vocabulary, C tokens of a chunk, X neighbors of a token.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from cascade_fast.base.sequences import Sequences
from cascade_fast.criteria import token_entropy
from cascade_fast.hard_token_gather import HardTokenGather
from cascade_fast.input_checks import InputError
from cascade_fast.model.measuring import judge
from cascade_fast.runtime.compute import sent
from cascade_fast.runtime.console import Progress
from cascade_fast.runtime.files import DamagedFile, load_tensors, new_folder, read_json, save_tensors, write_json
from cascade_fast.selection import EVERY_TOKEN, select_hardest

FOLDER = "neighbors"  # beside a model's weights
DEPTH = 0.8  # of the model's layers: where the first half of a key comes from; the other is from the last layer
KEY_SIZE = 256  # principal components
CHUNK = 4096  # tokens whose states are in float32 at once
SEARCH_BYTES = 2**26  # of similarities at once
SHRINK = 1e-6  # of the gate: weights above ten are of use, where only near copies of a text say anything
NO_NEIGHBOR = 1e-30  # probability of a label that no neighbor has, where its logarithm is taken


@dataclass(frozen=True)
class NeighborsConfig:
    """What is settled of a lookup.

    Attributes:
        layers: of the model, whose feed-forward inputs side by side are a token's state.
        threshold: a token is hard iff minus the entropy of the model's logits, in nats, is at or below.
        neighbors: how many are asked, at most.
        temperature: ``T`` of the cosines.
        gate: ``g = sigmoid(gate[0] + gate[1] * cosine of the nearest + gate[2] * mass of the nearest's label)``.
    """

    layers: tuple[int, ...]
    threshold: float
    neighbors: int
    temperature: float = 0.05
    gate: tuple[float, float, float] = (-3.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class ReadTokens:
    """Labelled tokens that a model has read.

    Attributes:
        state_NE: what the layers say of the text up to each, in the model's dtype, on the CPU.
        label_N: int64.
        log_p_N: float32, of the label.
        score_N: float32, minus the entropy.
        sequence_N: int64, number of the token's sequence.
    """

    state_NE: Tensor
    label_N: Tensor
    log_p_N: Tensor
    score_N: Tensor
    sequence_N: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """The neighbors of K tokens, nearest first: cosines ``(K, X)`` float32 and labels ``(K, X)`` int64."""

    cosine_KX: Tensor
    label_KX: Tensor

    def weights(self, temperature: Tensor | float) -> Tensor:
        """``(K, X)``, of sum one a token."""
        return (self.cosine_KX / temperature).softmax(-1)

    def gate(self, weight_KX: Tensor, gate_3: Tensor) -> Tensor:
        """``(K,)``: the logit of the share that the neighbors get."""
        nearest_K1 = self.label_KX[:, :1]
        mass_K = (weight_KX.detach() * (self.label_KX == nearest_K1)).sum(-1)
        return gate_3[0] + gate_3[1] * self.cosine_KX[:, 0] + gate_3[2] * mass_K


class HardTokenNeighbors(nn.Module):
    """What hard tokens look up. A module without parameters to train, for any causal model of transformers.

    >>> neighbors = HardTokenNeighbors.from_pretrained("my-model")
    >>> neighbors.attach(model)  # its logits are the mixture from now on, in generate(), too
    >>> neighbors.detach()

    Args:
        config: what is settled.
        key_MP: ``(M, P)`` unit vectors, bfloat16 or float32.
        label_M: ``(M,)`` int32 or int64, the tokens that followed, in [0, V).
        mean_E, projection_EP: ``(E,)`` and ``(E, P)`` float32: a state ``x`` is asked for as ``(x - mean) @
            projection``, brought to length one.

    Raises:
        ValueError: shapes that do not match, or no key.
    """

    def __init__(
        self, config: NeighborsConfig, key_MP: Tensor, label_M: Tensor, mean_E: Tensor, projection_EP: Tensor
    ) -> None:
        super().__init__()
        (m, p), (e,) = key_MP.shape, mean_E.shape
        if m == 0 or label_M.shape != (m,) or projection_EP.shape != (e, p) or e % len(config.layers):
            shapes = [tuple(t.shape) for t in (key_MP, label_M, mean_E, projection_EP)]
            raise ValueError(
                f"keys, labels, mean, projection: {shapes}; must be (M, P), (M,), (E,), (E, P) with M >= 1"
            )
        self.config = config
        self.register_buffer("key_MP", key_MP, persistent=False)
        self.register_buffer("label_M", label_M.long(), persistent=False)
        self.register_buffer("mean_E", mean_E, persistent=False)
        self.register_buffer("projection_EP", projection_EP, persistent=False)
        self.gather = HardTokenGather(threshold=config.threshold, criterion="entropy")
        self._hooks: list[Any] = []

    def search(self, state_KE: Tensor) -> Found:
        """The nearest of the kept tokens, ``min(config.neighbors, M)`` of them. Exact: every key is compared."""
        key_MP, label_M = self.get_buffer("key_MP"), self.get_buffer("label_M")
        most = min(self.config.neighbors, len(key_MP))
        query_KP = _keys(state_KE, self.get_buffer("mean_E"), self.get_buffer("projection_EP")).to(key_MP.dtype)
        cosines, labels = [query_KP.new_empty(0, most).float()], [label_M.new_empty(0, most)]
        for query_CP in query_KP.split(max(1, SEARCH_BYTES // (4 * len(key_MP)))):
            cosine_CX, nearest_CX = (query_CP @ key_MP.T).float().topk(most, dim=-1)
            cosines.append(cosine_CX)
            labels.append(label_M[nearest_CX])
        return Found(torch.cat(cosines), torch.cat(labels))

    @torch.no_grad()
    def forward(self, state_NE: Tensor, logits_NV: Tensor) -> Tensor:
        """The logits, those of hard tokens replaced by log-probabilities of the mixture.

        Args:
            state_NE: ``(N, E)`` or ``(B, S, E)``, inputs of the layers' feed-forward parts side by side, float.
            logits_NV: ``(N, V)`` or ``(B, S, V)``, float32, float16 or bfloat16, of the same tokens.

        Returns:
            Shape and dtype of ``logits_NV``, which is not modified.
        """
        hard = self.gather(state_NE, state_NE, logits=logits_NV)
        if not len(hard.index_K):
            return logits_NV
        found = self.search(hard.hidden_KD)
        logits_KV = logits_NV.flatten(0, -2)[hard.index_K]
        weight_KX = found.weights(self.config.temperature)
        gate_K = found.gate(weight_KX, weight_KX.new_tensor(self.config.gate))
        p_KV = logits_KV.new_zeros(logits_KV.shape, dtype=torch.float32)
        p_KX = p_KV.scatter_add_(1, found.label_KX, weight_KX).gather(1, found.label_KX)
        mixed_KV = logits_KV.float().log_softmax(-1)
        mixed_KX = _mixed(gate_K[:, None], mixed_KV.gather(1, found.label_KX), p_KX)
        # Few tokens of the vocabulary are a neighbor's label: of the others there is the model's part alone.
        mixed_KV.add_(logsigmoid(-gate_K)[:, None]).scatter_(1, found.label_KX, mixed_KX)
        return hard.scatter(mixed_KV.to(logits_NV.dtype), into=logits_NV)

    @torch.no_grad()
    def log_p(self, read: ReadTokens) -> tuple[Tensor, Tensor]:
        """Of every token's label under the mixture, ``(N,)`` float32, and which are hard, ``(K,)`` int64. What
        :meth:`forward` gives, without the vocabulary."""
        hard_K = (read.score_N <= self.config.threshold).nonzero().squeeze(1)
        temperature, gate_3 = torch.tensor(self.config.temperature), torch.tensor(self.config.gate)
        log_p_K = _log_p(self._found(read, hard_K), read, hard_K, temperature, gate_3)
        return read.log_p_N.index_copy(0, hard_K, log_p_K), hard_K

    def _found(self, read: ReadTokens, of_K: Tensor) -> Found:
        """On the CPU, wherever the keys are."""
        found = self.search(sent(read.state_NE[of_K], self.get_buffer("key_MP").device))
        return Found(found.cosine_KX.cpu(), found.label_KX.cpu())

    def fitted(self, validation: ReadTokens, hard_ratio: float = 0.7) -> Self:
        """The same tokens, with the temperature and the gate under which the labels of the hard tokens of
        ``validation``, the share ``hard_ratio`` with the highest entropy, are likeliest.

        Raises:
            ValueError: no tokens, or ``hard_ratio`` outside (0, 1].
        """
        selection = select_hardest(validation.score_N, hard_ratio)
        hard_K = selection.index_K
        found = self._found(validation, hard_K)
        log_temperature, gate_3 = torch.tensor(self.config.temperature).log(), torch.tensor(self.config.gate)
        numbers = [log_temperature.requires_grad_(), gate_3.requires_grad_()]
        optimizer = torch.optim.LBFGS(numbers, max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -_log_p(found, validation, hard_K, log_temperature.exp(), gate_3).mean()
            value = value + SHRINK * gate_3.square().sum()  # where nothing is found the gate would go to -infinity
            value.backward()
            return value

        optimizer.step(loss)
        always, per_cosine, per_mass = gate_3.tolist()
        settled = NeighborsConfig(
            self.config.layers,
            selection.threshold,
            self.config.neighbors,
            log_temperature.exp().item(),
            (always, per_cosine, per_mass),
        )
        return type(self)(settled, *self.buffers())

    # --- a model that uses it -----------------------------------------------------------------------------------------

    def attach(self, model: Any) -> Self:
        """From now on ``model``, a causal model of transformers, gives the mixture's logits (and loss).

        Raises:
            InputError: attached already, or a model without such a layer or of another hidden size or vocabulary.
        """
        if self._hooks:
            raise InputError("model: these neighbors are attached to a model already; detach() them first")
        self._check(model)
        self.to(model.device)
        states, hooks = _caught(model, self.config.layers)

        def mix(_model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if isinstance(output, tuple):
                raise ValueError("return_dict: False; must be True for a model with neighbors attached")
            if output.loss is not None and kwargs.get("labels") is None:
                raise ValueError("labels: must be given by name to a model with neighbors attached")
            kept = kwargs.get("logits_to_keep", 0)  # as transformers' models take it
            state_BSE = _taken(states)[:, slice(-kept, None) if isinstance(kept, int) else kept]
            output.logits = self(state_BSE, output.logits)
            if output.loss is not None:
                output.loss = model.loss_function(output.logits, kwargs["labels"], vocab_size=model.config.vocab_size)
            return output

        self._hooks = [*hooks, model.register_forward_hook(mix, with_kwargs=True)]
        return self

    def _check(self, model: Any) -> None:
        check_layers(model, self.config.layers)
        of, largest = model.config, int(self.get_buffer("label_M").max())
        size = self.get_buffer("mean_E").shape[0] // len(self.config.layers)
        if of.hidden_size != size or of.vocab_size <= largest:
            raise InputError(
                f"model: hidden size {of.hidden_size}, vocabulary {of.vocab_size}; the neighbors are of a model with "
                f"{size} and more than {largest}"
            )

    def detach(self) -> None:
        """The model is as it was."""
        while self._hooks:
            self._hooks.pop().remove()

    # --- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Into the subfolder ``neighbors``, which must not be there. Raises InputError."""
        to = Path(folder) / FOLDER
        check_free(to)
        tensors = {"keys": self.get_buffer("key_MP"), "labels": self.get_buffer("label_M").int()}
        tensors |= {"mean": self.get_buffer("mean_E"), "projection": self.get_buffer("projection_EP")}
        with new_folder(to, size=self.bytes) as temporary:
            save_tensors(temporary / "neighbors.safetensors", tensors)
            write_json(temporary / "neighbors.json", dataclasses.asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Of what :meth:`save_pretrained` has written. Raises DamagedFile."""
        where = Path(folder) / FOLDER
        names = [field.name for field in dataclasses.fields(NeighborsConfig)]
        content = read_json(where / "neighbors.json", needs=names)
        tensors, _ = load_tensors(where / "neighbors.safetensors")
        listed = {name: tuple(content[name]) for name in ("layers", "gate")}
        config = NeighborsConfig(**{name: content[name] for name in names} | listed)
        try:
            return cls(config, *(tensors[name] for name in ("keys", "labels", "mean", "projection")))
        except (KeyError, ValueError) as error:
            raise DamagedFile(f"{str(where / 'neighbors.safetensors')!r} is damaged: {error}") from error

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers())


def check_free(to: Path) -> None:
    """Raises InputError where a model has neighbors."""
    if to.exists():
        raise InputError(f"MODEL: {str(to.parent)!r}; has neighbors already: remove {str(to)!r} first")


def _mixed(gate: Tensor, log_p: Tensor, p_neighbors: Tensor) -> Tensor:
    """Log of ``(1 - g) p + g p_neighbors``, ``g = sigmoid(gate)``."""
    return torch.logaddexp(logsigmoid(-gate) + log_p, logsigmoid(gate) + p_neighbors.clamp(min=NO_NEIGHBOR).log())


def _log_p(found: Found, read: ReadTokens, of_K: Tensor, temperature: Tensor, gate_3: Tensor) -> Tensor:
    weight_KX = found.weights(temperature)
    p_K = (weight_KX * (found.label_KX == read.label_N[of_K, None])).sum(-1)
    return _mixed(found.gate(weight_KX, gate_3), read.log_p_N[of_K], p_K)


# --- states of a model ------------------------------------------------------------------------------------------------


def default_layers(model: Any) -> tuple[int, ...]:
    """The one at ``DEPTH`` of all, and the last."""
    layers = model.config.num_hidden_layers
    return tuple(dict.fromkeys((int(DEPTH * layers), layers - 1)))


def check_layers(model: Any, numbers: Sequence[int]) -> None:
    """Raises InputError for a model of another kind, or without such layers."""
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    if layers is None or not all(hasattr(one, "mlp") for one in layers):
        raise InputError(f"model: {type(model).__name__}; must have decoder layers with a part 'mlp'")
    if not numbers or not all(0 <= number < len(layers) for number in numbers):
        raise InputError(f"layers: {tuple(numbers)}; must be in [0, {len(layers)}), one at least")


def _caught(model: Any, numbers: Sequence[int]) -> tuple[dict[int, Tensor], list[Any]]:
    """Where a forward pass leaves what goes into the layers' feed-forward parts, ``(B, S, hidden size)``; the hooks."""
    states: dict[int, Tensor] = dict.fromkeys(range(len(numbers)), torch.empty(0))

    def catch(place: int, _part: nn.Module, args: tuple[Any, ...]) -> None:
        states[place] = args[0]

    parts = [model.get_decoder().layers[number].mlp for number in numbers]
    return states, [part.register_forward_pre_hook(partial(catch, place)) for place, part in enumerate(parts)]


def _taken(states: dict[int, Tensor]) -> Tensor:
    """The states side by side, which are then free."""
    state_BSE = torch.cat(list(states.values()), dim=-1)
    states.update(dict.fromkeys(states, torch.empty(0)))
    return state_BSE


# --- making it --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_tokens(
    model: Any, sequences: Sequences, layers: Sequence[int], *, batch_tokens: int = 1024, name: str
) -> ReadTokens:
    """Every labelled token of ``sequences`` in the model, a causal one of transformers. Padding is on the right, so
    that no token sees it. Raises InputError as :func:`check_layers`."""
    check_layers(model, layers)
    states, hooks = _caught(model, layers)
    parts = []
    try:
        with Progress(name, sequences.tokens) as progress:
            for some in sequences.batches(batch_tokens):
                padded = sequences.padded(some)
                input_BS, real_BS = (sent(t, model.device) for t in (padded.input_BS, padded.labelled_BS))
                logits_NV = model(input_BS, use_cache=False).logits[real_BS]
                label_N = sent(padded.label_BS, model.device)[real_BS]
                loss_N, _ = judge(logits_NV, label_N)
                number_N = torch.arange(len(sequences))[some, None].expand_as(padded.labelled_BS)[padded.labelled_BS]
                state_NE = _taken(states)[real_BS]
                parts.append((*(t.cpu() for t in (state_NE, label_N, -loss_N, -token_entropy(logits_NV))), number_N))
                progress.advance(int(padded.real_BS.sum()))
    finally:
        for hook in hooks:
            hook.remove()
    return ReadTokens(*(torch.cat(of) for of in zip(*parts, strict=True)))


def keep_tokens(kept: ReadTokens, *, layers: Sequence[int], neighbors: int = 256) -> HardTokenNeighbors:
    """Neighbors of the training tokens ``kept``, for every token and with nothing fitted: see
    :meth:`HardTokenNeighbors.fitted`. Raises ValueError: ``neighbors`` below 1."""
    if neighbors < 1:
        raise ValueError(f"neighbors: {neighbors}; must be at least 1")
    mean_E, projection_EP = _principal(kept.state_NE)
    parts = kept.state_NE.split(CHUNK)
    key_MP = torch.cat([_keys(state_CE, mean_E, projection_EP).bfloat16() for state_CE in parts])
    config = NeighborsConfig(tuple(layers), EVERY_TOKEN, neighbors)
    return HardTokenNeighbors(config, key_MP, kept.label_N, mean_E, projection_EP)


def _keys(state_NE: Tensor, mean_E: Tensor, projection_EP: Tensor) -> Tensor:
    """``(N, P)`` float32 unit vectors."""
    return normalize((state_NE.float() - mean_E) @ projection_EP, dim=-1)


def _principal(state_ME: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and the projection on the first principal components of the states, every number of which is brought
    to variance one before: a few of a model's are a hundred times as large as the others."""
    size, parts = state_ME.shape[1], state_ME.split(CHUNK)
    sum_E, square_EE = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for state_CE in parts:
        sum_E += state_CE.float().sum(0)
    mean_E = (sum_E / len(state_ME)).float()
    for state_CE in parts:
        centred_CE = state_CE.float() - mean_E
        square_EE += centred_CE.T @ centred_CE
    scale_E = (square_EE.diagonal() / len(state_ME)).clamp(min=1e-12).rsqrt()
    _, vector_EE = torch.linalg.eigh(square_EE * scale_E * scale_E[:, None])  # in ascending order
    return mean_E, (scale_E[:, None] * vector_EE[:, -min(KEY_SIZE, size) :]).float()


def cross_fitted(of: HardTokenNeighbors, validation: ReadTokens, hard_ratio: float = 0.7) -> Tensor:
    """Log-probabilities of validation's labels, ``(N,)``, each half of its sequences by what was fitted on the other:
    not flattered by the fit. Raises InputError: one sequence."""
    log_p_N = torch.empty_like(validation.log_p_N)
    for half in (0, 1):
        fits_N = validation.sequence_N % 2 == half
        if not fits_N.any() or fits_N.all():
            raise InputError("validation: one sequence; must be two at least")
        log_p_N[~fits_N] = of.fitted(_rows(validation, fits_N), hard_ratio).log_p(_rows(validation, ~fits_N))[0]
    return log_p_N


def _rows(read: ReadTokens, of_N: Tensor) -> ReadTokens:
    return ReadTokens(*(getattr(read, field.name)[of_N] for field in dataclasses.fields(ReadTokens)))
