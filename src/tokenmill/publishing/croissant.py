"""Croissant: a data root → `croissant.json`, metadata of a data set in JSON-LD.

The format is Croissant 1.1 of MLCommons (https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html); lineage is
in the terms of W3C's PROV-O, as its section on provenance recommends.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pyarrow as pa

from tokenmill.dataroot.sidecar import documents_schema
from tokenmill.publishing.facts import Facts
from tokenmill.publishing.preview import PREVIEW, SCHEMA
from tokenmill.recipe import SIDECAR_COLUMNS

CROISSANT = "croissant.json"
_VERSION = "http://mlcommons.org/croissant/1.1"
_NOT_IN_IDS = re.compile(r"[^\w.-]")
_PARQUET = "application/x-parquet"
"""As the hub and the reader of MLCommons name it."""
_FORMATS = {".parquet": _PARQUET, ".json": "application/json", ".jsonl": "application/jsonlines"}

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""Appendix 1 of the specification, and PROV-O."""

_FIELDS = {
    "start": "First token of the document, counted in the whole stream.",
    "tokens": "Number of its tokens, end of document included.",
    "source": "Source file, relative to the corpus.",
    "row": "Row of the source file, from 0.",
    "text_xxh3": "XXH3-64 of its text, as an unsigned integer.",
    "sample": "Number of the sample, from 0.",
    "text": "What the tokens of the sample decode to.",
    "input_ids": "The tokens of the sample.",
    "sources": "The source files and rows that the tokens come from.",
}


def croissant(facts: Facts) -> bytes:
    """Return `croissant.json`: every file with its SHA-256, the records in sidecars and preview, and the lineage."""
    sidecars = [name for name in facts.files if name.startswith("documents_")]
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": facts.name,
        "description": facts.description,
        "conformsTo": _VERSION,
        **({"license": facts.license} if facts.license else {}),
        **({"url": facts.url} if facts.url else {}),
        "version": "1.0.0",
        "prov:wasDerivedFrom": [_entity(source.name, source.url) for source in facts.lineage],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "prov:label": f"tokenmill, fingerprint of the recipe {facts.fingerprint}",
            "prov:used": [_entity(f"tokenizer.json, SHA-256 {facts.tokenizer.sha256}", facts.tokenizer_url)],
            "prov:wasAssociatedWith": [
                {"@type": "prov:SoftwareAgent", "prov:label": f"{name} {version}"}
                for name, version in facts.software.items()
            ],
        },
        "distribution": [_file_object(name, *known) for name, known in facts.files.items()],
    }
    record_sets = []
    if sidecars:
        document["distribution"].append(
            {
                "@type": "cr:FileSet",
                "@id": "documents",
                "name": "documents",
                "description": "Where each document begins, and what it comes from.",
                "encodingFormat": _PARQUET,
                "includes": "documents_*.parquet",
            }
        )
        schema = documents_schema(facts.manifest)
        record_sets.append(_record_set("document", "A document of the data set.", {"fileSet": "documents"}, schema))
    if PREVIEW in facts.files:
        simple = pa.schema([field for field in SCHEMA if field.name != "sources"])
        record_sets.append(_record_set("preview", "Some samples, as text and tokens.", {"fileObject": PREVIEW}, simple))
    if record_sets:
        document["recordSet"] = record_sets
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _entity(label: str, url: str | None) -> dict[str, str]:
    return {"@type": "prov:Entity", **({"@id": url} if url else {}), "prov:label": label}


def _file_object(name: str, nbytes: int, sha256: str) -> dict[str, str]:
    kind = next((kind for end, kind in _FORMATS.items() if name.endswith(end)), "application/octet-stream")
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{nbytes} B",
        "encodingFormat": kind,
        "sha256": sha256,
    }


def _record_set(name: str, description: str, where: dict[str, str], schema: pa.Schema) -> dict[str, Any]:
    ((kind, id),) = where.items()
    known = SCHEMA.names if name == "preview" else SIDECAR_COLUMNS
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{name}/{_NOT_IN_IDS.sub('_', field.name)}",
                "name": field.name,
                "description": _FIELDS[field.name] if field.name in known else "Metadata column of the recipe.",
                "dataType": _data_type(field.type),
                **({"isArray": True, "arrayShape": "-1"} if pa.types.is_list(field.type) else {}),
                "source": {kind: {"@id": id}, "extract": {"column": field.name}},
            }
            for field in schema
        ],
    }


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
