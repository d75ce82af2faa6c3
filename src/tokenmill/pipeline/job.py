"""Job: what a run works with, found and checked before anything is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tokenmill.corpus.choice import RULES
from tokenmill.corpus.corpus import Corpus, find_corpus
from tokenmill.corpus.location import without_secrets
from tokenmill.dataroot import layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.dataroot.earlier_run import refuse_foreign
from tokenmill.dataroot.manifest import FileRecord, Manifest, TokenizerRecord
from tokenmill.encoding.encoder import Encoder
from tokenmill.encoding.tokenizer import load_tokenizer, with_special_tokens
from tokenmill.errors import DataRootError, StorageError
from tokenmill.options import OnBadRows, StoreOptions
from tokenmill.pipeline.cluster_engine import ClusterEngine
from tokenmill.pipeline.growth import cut_short, find_new_files
from tokenmill.pipeline.preflight import Preflight
from tokenmill.pipeline.resume import refuse_inside, refuse_other, refuse_other_form
from tokenmill.progress import OnProgress, Progress
from tokenmill.recipe import Recipe, validate_recipe

if TYPE_CHECKING:
    from tokenmill.pipeline.destination import Destination


class RunOptions(NamedTuple):
    """The arguments of `pretokenize` that change no byte of a shard; it documents them."""

    workers: int
    span_rows: int | None
    consolidated: bool
    id_scheme: layout.IdScheme | None
    on_bad_rows: OnBadRows
    store: StoreOptions
    upload_to: str | None
    keep_local: bool
    engine: ClusterEngine | None
    only_new: Sequence[Path]
    on_progress: OnProgress
    on_plan: Callable[[Preflight], None]


class RunInputs(NamedTuple):
    """A recipe with its corpus found and its tokenizer loaded."""

    recipe: Recipe
    """With `dtype` and `eos_token` resolved."""
    corpus: Corpus
    encoder: Encoder

    @property
    def notes(self) -> list[str]:
        """What a user should know about what was found."""
        return [*self.corpus.notes, *self.encoder.notes]

    def new_manifest(self) -> Manifest:
        """Return the manifest of a data root that is about to be begun."""
        tokenizer = self.encoder.tokenizer
        return Manifest(
            recipe=self.recipe,
            fingerprint=self.recipe.fingerprint,
            tokenizer=TokenizerRecord(
                tokenizer.name,
                tokenizer.revision,
                tokenizer.sha256,
                tokenizer.vocab_size,
                tokenizer.eos_id,
                probe={},
                bos_id=tokenizer.bos_id,
                fim_ids=tokenizer.fim.ids if tokenizer.fim is not None else None,
                fim_lead=tokenizer.fim.lead if tokenizer.fim is not None else "",
            ),
            software=self.software(),
            files=[FileRecord(file.path, file.nbytes, etag=file.etag) for file in self.corpus.files],
            source_rules=RULES,
            notes=self.notes,
            source_revision=self.corpus.location.revision,
            documents_version=layout.DOCUMENTS_VERSION,
        )

    def software(self) -> dict[str, str]:
        """Return the versions that the manifest records."""
        return _versions() | {"engine": self.encoder.backend.version}


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tokenmill", "numpy", "pyarrow", "tokenizers")}


class Job(NamedTuple):
    """A run on a data root, whose lock is held."""

    root: Path
    manifest: Manifest
    inputs: RunInputs
    options: RunOptions
    destination: Destination | None

    @property
    def keeps_shards(self) -> bool:
        """Whether shards stay in the data root."""
        return self.destination is None or self.options.keep_local

    def enter_phase(self, phase: str) -> None:
        """Report what the run does next."""
        self.options.on_progress(Progress(self.manifest.tokens, self.manifest.documents, phase=phase))


def find_inputs(
    recipe: Recipe,
    *,
    tokenizer_backend: str = "auto",
    revision: str | None = None,
    store: StoreOptions,
    only: Sequence[str] | None = None,
) -> RunInputs:
    """Find the corpus, load the tokenizer, and resolve what the recipe leaves open.

    Args:
        recipe: defines the bytes.
        tokenizer_backend: `auto`, `gigatoken` or `hf`.
        revision: the commit of the tokenizer's repository; None takes the one that its name says.
        store: how to reach the corpus.
        only: files of the corpus, if an earlier run chose them; None chooses them now.

    Raises:
        RecipeError, SourceError, TokenizerError: as those stages say.
    """
    recipe = validate_recipe(recipe)
    where = recipe.dataset, recipe.text_column, recipe.text_separator
    corpus = find_corpus(*where, store, only=only, metadata=recipe.metadata)
    tokenizer = load_tokenizer(recipe.tokenizer, eos_token=recipe.eos_token, revision=revision)
    tokenizer = with_special_tokens(tokenizer, recipe)
    encoder = Encoder(tokenizer, backend=tokenizer_backend, special_in_text=recipe.special_in_text, dtype=recipe.dtype)
    dataset = without_secrets(recipe.dataset)
    resolved = msgspec.structs.replace(
        recipe,
        dataset=dataset,
        dtype=encoder.dtype.name,
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
        fim_tokens=tokenizer.fim.tokens if tokenizer.fim is not None else None,
    )
    return RunInputs(resolved, corpus, encoder)


def load_agreeing(
    recipe: Recipe,
    root: Path,
    tokenizer_backend: str,
    store: StoreOptions,
    *,
    consolidated: bool,
    only_new: Sequence[Path] = (),
) -> tuple[Manifest | None, RunInputs]:
    """Load the manifest of a data root, if a run began one, and the inputs, which must agree with it.

    `only_new` names earlier data roots, whose files are left out.

    Raises:
        DataRootError: the directory holds something else, or a data root of another recipe, form or corpus.
        RecipeError, SourceError, TokenizerError: as of `find_inputs`.
    """
    manifest = manifests.load(root)
    if manifest is None:
        refuse_foreign(root)
    elif manifest.imported is not None:
        raise DataRootError(
            f"{root}: was imported from {manifest.imported.source}",
            next_step="tokenmill import continues it; choose another directory for other data",
        )
    elif manifest.view is not None:
        raise DataRootError(
            f"{root}: was written from a view",
            next_step="tokenmill view write continues it; choose another directory for other data",
        )
    elif not manifest.is_begun:  # nothing was made: there is nothing to agree with
        manifest = None
    if manifest is not None and manifest.recipe.dataset == without_secrets(recipe.dataset):
        store = store._replace(revision=manifest.source_revision)
    has_older_rules = manifest is not None and manifest.source_rules < RULES
    only = None
    if manifest is not None and (has_older_rules or only_new):
        only = [file.path for file in manifest.files]
    elif only_new:
        only = find_new_files(recipe, only_new, store)
    inputs = find_inputs(
        recipe,
        tokenizer_backend=tokenizer_backend,
        revision=_pinned_revision(manifest, recipe),
        store=store,
        only=only,
    )
    if manifest is None and only_new:
        names = ", ".join(map(str, only_new))
        inputs.encoder.notes.append(f"files of the corpus that earlier data roots were made from are left out: {names}")
        inputs.encoder.notes += cut_short(only_new)
    refuse_inside(root, inputs.recipe, inputs.corpus)
    encoder = inputs.encoder
    if manifest is not None and encoder.notes and "gigatoken" in manifest.software.get("engine", ""):
        encoder.notes.append(
            f"{root}: its shards so far were encoded by {manifest.software['engine']}, which is no longer trusted with "
            "this tokenizer: prove them with tokenmill verify --deep"
        )
    if manifest is not None:
        refuse_other(root, manifest, *inputs)
        refuse_other_form(root, manifest, manifests.load_consolidated(root), consolidated=consolidated)
    return manifest, inputs


def _pinned_revision(manifest: Manifest | None, recipe: Recipe) -> str | None:
    """Return the hub commit that an earlier run resolved the recipe's tokenizer to."""
    if manifest is None or manifest.tokenizer.name != recipe.tokenizer:
        return None
    return manifest.tokenizer.revision


def open_destination(root: Path, manifest: Manifest, options: RunOptions) -> Destination | None:
    """Open the bucket that the data set goes to, if it goes to one.

    Raises:
        StorageError: the options contradict each other, or the bucket cannot be used.
    """
    if options.upload_to is None:
        if not options.keep_local:
            raise StorageError("--keep-local no requires --upload-to", next_step="name a bucket with --upload-to")
        return None
    if options.consolidated and not options.keep_local:
        raise StorageError(
            f"--keep-local no does not go with --consolidated: {layout.TOKENS} grows to the end of the run and cannot "
            "be sent in pieces",
            next_step="leave out --consolidated or --keep-local no",
        )
    from tokenmill.pipeline.destination import Destination  # loads the clients of buckets

    return Destination(root, manifest, options.upload_to, options.store, keep_local=options.keep_local)
