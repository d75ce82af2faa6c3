"""S3: objects of a bucket; the one module that imports `botocore` (extra `s3`).

`botocore` knows where credentials come from (environment, profiles, SSO, instance roles), signs, and
speaks multipart uploads in full: parts of an interrupted one can be listed, kept or aborted. The bytes
themselves travel by `http.py` over signed URLs, so that one place decides what is a whole answer.
"""

from __future__ import annotations

import functools
import os
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from tokenmill.errors import StorageError
from tokenmill.remote import etag as etags
from tokenmill.remote import retry
from tokenmill.remote.certificates import CANNOT_VERIFY, ca_bundle
from tokenmill.remote.http import CONNECT_SECONDS, CONNECTIONS, STALL_SECONDS, HttpClient
from tokenmill.remote.retry import AnswerError, Pages, TransientError, is_limit, is_transient, run_within, stated_wait

T = TypeVar("T")

Ask = Callable[[Callable[[], Any]], Any]
"""Runs a request, and again where it may succeed at the next try."""

_SIGNED_SECONDS = 3600

COMPLETE_SECONDS = 900.0
"""A store sends blanks while it joins the parts of a large object."""
_MOST_NBYTES = 1 << 63


class S3Object(NamedTuple):
    """An object of a bucket."""

    key: str
    nbytes: int
    etag: str
    """In canonical form (`etag.canonical`)."""


class UploadedPart(NamedTuple):
    """A part of a multipart upload."""

    number: int
    """From 1."""
    nbytes: int
    etag: str


class Bucket:
    """A bucket and the credentials to use it; threads share one.

    Every method is one try and raises:
        TransientError: it may succeed at the next.
        AnswerError: refused.
        StorageError: no usable credentials, or the extra is not installed.
    """

    def __init__(self, name: str, http: HttpClient, *, endpoint_url: str | None = None, anonymous: bool = False):
        self.name = name
        self._http = http
        self._endpoint_url, self._anonymous = endpoint_url, anonymous
        self._session = _open_session()
        self.client = _client(self._session, endpoint_url, anonymous, None)
        http.trust(_configured_bundle(self._session))
        self._is_canonical = True
        """Whether the store writes ETags as we do, so that it can be asked for an object of that ETag."""
        self._signer: Any = None
        """A client of the bucket's own region, once that was asked for."""

    def objects(self, prefix: str, ask: Ask) -> Iterator[S3Object]:
        """Objects whose key begins with `prefix`, by key; `ask` tries each page again where that is worth it."""
        token: dict[str, str] = {}
        pages = Pages(f"s3://{self.name}/{prefix}", StorageError)
        while True:
            page, token = ask(functools.partial(self._tried, functools.partial(self._page, prefix, token)))
            yield from page
            if not token:
                return
            pages.add(len(page), token["ContinuationToken"])

    def _page(self, prefix: str, token: dict[str, str]) -> tuple[list[S3Object], dict[str, str]]:
        page = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix, **token)
        found = [S3Object(entry["Key"], entry["Size"], self._etag(entry)) for entry in page.get("Contents", ())]
        if strange := [each for each in found if not 0 <= each.nbytes < _MOST_NBYTES]:
            raise ValueError(f"{strange[0].key}: {strange[0].nbytes} bytes")
        return found, {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else {}

    def _etag(self, answer: dict[str, Any]) -> str:
        found = etags.canonical(answer["ETag"])
        self._is_canonical = self._is_canonical and found == answer["ETag"]
        return found

    def head(self, key: str) -> S3Object | None:
        """Return an object; None if there is none of that key."""

        def found() -> S3Object:
            answer = self.client.head_object(Bucket=self.name, Key=key)
            return S3Object(key, answer["ContentLength"], self._etag(answer))

        try:
            return self._tried(found)
        except AnswerError as error:
            if error.status == 404:
                return None
            raise

    def first_part_nbytes(self, key: str) -> int | None:
        """Size of the parts an object was uploaded in; None where the store does not say, or refuses the question."""

        def found() -> int | None:
            answer = self.client.head_object(Bucket=self.name, Key=key, PartNumber=1)
            return int(answer["ContentLength"]) if answer.get("PartsCount", 0) > 1 else None

        try:
            return self._tried(found)
        except AnswerError:
            return None

    def read(self, found: S3Object, offset: int, nbytes: int, into: bytearray | None = None) -> bytearray:
        """Return bytes of an object (see `HttpClient.read`) that is still the one found; raises ChangedError if not."""
        url = self.sign("get_object", Key=found.key)
        etag = found.etag if self._is_canonical else f"W/{found.etag}"  # compared with the answer's, not asked for
        return self._http.read(url, offset, nbytes, total=found.nbytes, etag=etag, into=into)[0]

    def put(self, key: str, data: bytes, md5: str) -> str:
        """Store a whole object; its ETag.

        Args:
            key: of the object.
            data: its bytes.
            md5: of the bytes, as `etag.md5_etag` writes it. The store refuses other bytes that reach it under this
                request, also where it is late and another try has long succeeded.
        """
        return self._put("put_object", data, md5, Key=key)

    def _put(self, operation: str, data: bytes, md5: str, **parameters: object) -> str:
        digest = etags.content_md5(md5)
        url = self.sign(operation, ContentMD5=digest, **parameters)
        return etags.canonical(self._http.put(url, data, {"Content-MD5": digest}))

    def delete(self, key: str) -> None:
        self._tried(lambda: self.client.delete_object(Bucket=self.name, Key=key))

    def begin_upload(self, key: str) -> str:
        """Begin a multipart upload; its id."""
        begin = self.client.create_multipart_upload
        return self._tried(lambda: str(begin(Bucket=self.name, Key=key)["UploadId"]))

    def uploads(self, key: str) -> list[str]:
        """Return ids of the multipart uploads of `key` that were begun and not ended, oldest first.

        None where the store cannot say: an interrupted upload begins anew there.
        """

        def listed() -> list[str]:
            found: list[dict[str, Any]] = []
            marker: dict[str, str] = {}
            while True:
                page = self.client.list_multipart_uploads(Bucket=self.name, Prefix=key, **marker)
                found += [entry for entry in page.get("Uploads", ()) if entry["Key"] == key]
                following = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
                if not page.get("IsTruncated") or not following["KeyMarker"] or following == marker:
                    break
                marker = {name: value for name, value in following.items() if value}
            return [entry["UploadId"] for entry in sorted(found, key=lambda entry: entry["Initiated"])]

        try:
            return self._tried(listed)
        except AnswerError as error:
            if error.status == 501:
                return []
            raise

    def parts(self, key: str, upload: str) -> list[UploadedPart]:
        """Return what an upload holds so far, by number."""
        found: list[UploadedPart] = []
        while True:
            marker = found[-1].number if found else 0
            page, more = self._tried(functools.partial(self._parts_page, key, upload, marker))
            found += page
            if not more or not page:
                return found

    def _parts_page(self, key: str, upload: str, marker: int) -> tuple[list[UploadedPart], bool]:
        page = self.client.list_parts(Bucket=self.name, Key=key, UploadId=upload, PartNumberMarker=marker)
        found = [UploadedPart(each["PartNumber"], each["Size"], self._etag(each)) for each in page.get("Parts", ())]
        return found, bool(page["IsTruncated"])

    def put_part(self, key: str, upload: str, number: int, data: bytes, md5: str) -> str:
        """Send a part; its ETag. `md5` as in `put`."""
        return self._put("upload_part", data, md5, Key=key, UploadId=upload, PartNumber=number)

    def complete_upload(self, key: str, upload: str, parts: list[UploadedPart]) -> str:
        """Make the parts an object; its ETag."""
        listed = {"Parts": [{"PartNumber": part.number, "ETag": part.etag} for part in parts]}
        complete = self.client.complete_multipart_upload
        return self._tried(
            lambda: self._etag(complete(Bucket=self.name, Key=key, UploadId=upload, MultipartUpload=listed)),
            COMPLETE_SECONDS,
        )

    def abort_upload(self, key: str, upload: str) -> None:
        self._tried(lambda: self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload))

    def sign(self, operation: str, **parameters: object) -> str:
        def sign() -> str:
            if self._signer is None:
                region = self._region()
                same = region in (None, self.client.meta.region_name)
                self._signer = self.client
                if not same:
                    self._signer = _client(self._session, self._endpoint_url, self._anonymous, region)
            named = {"Bucket": self.name, **parameters}
            return str(self._signer.generate_presigned_url(operation, Params=named, ExpiresIn=_SIGNED_SECONDS))

        return self._tried(sign)

    def _region(self) -> str | None:
        """Return where AWS keeps the bucket; None for other stores. Calls are redirected there, signed URLs are not."""
        from botocore.exceptions import ClientError

        if not str(urllib.parse.urlsplit(self.client.meta.endpoint_url).hostname).endswith(".amazonaws.com"):
            return None
        try:
            answer = self.client.head_bucket(Bucket=self.name)
        except ClientError as error:
            answer = error.response  # says it, too
        region = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return None if region is None else str(region)

    def _tried(self, task: Callable[[], T], seconds: float | None = None) -> T:
        """Run a call of `botocore`, its errors as ours."""
        from botocore import exceptions, parsers

        host = urllib.parse.urlsplit(self.client.meta.endpoint_url).netloc
        try:
            return run_within(seconds or retry.CALL_SECONDS, task, host)
        except exceptions.ClientError as error:
            metadata = error.response.get("ResponseMetadata", {})
            status, code = int(metadata.get("HTTPStatusCode", 0)), str(error.response.get("Error", {}).get("Code", ""))
            if is_transient(status, code):
                wait = stated_wait(metadata.get("HTTPHeaders", {}))
                raise TransientError(f"HTTP {status} {code}", wait, limited=is_limit(status, code)) from None
            raise AnswerError(status, code, code=code) from None
        except exceptions.SSLError:
            raise AnswerError(0, f"no trusted connection to {host}: SSLError", next_step=CANNOT_VERIFY) from None
        except RecursionError:
            raise _redirected() from None
        except (exceptions.HTTPClientError, exceptions.ConnectionError, parsers.ResponseParserError) as error:
            if isinstance(getattr(error, "kwargs", {}).get("error"), RecursionError):
                raise _redirected() from None
            raise TransientError(type(error).__name__) from None
        except (KeyError, ValueError, Warning) as error:  # where warnings are errors, a damaged date is one
            raise TransientError(f"an answer that makes no sense: {type(error).__name__}") from None
        except exceptions.BotoCoreError as error:
            raise StorageError(
                f"s3://{self.name}: {next(iter(str(error).splitlines()), type(error).__name__)}",
                next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; a public bucket is "
                "read with --anonymous",
            ) from None


def _redirected() -> AnswerError:
    """Botocore asks where a redirect leads, of the server that redirects that question too, until the stack ends."""
    return AnswerError(307, "TemporaryRedirect without end", code="TemporaryRedirect")


def _open_session() -> Any:
    """Return a session of botocore, which takes longer to make than a client."""
    try:
        import botocore.session
    except ImportError:
        raise StorageError(
            "s3:// needs the extra s3, which is not installed", next_step="run: pip install 'tokenmill[s3]'"
        ) from None
    return botocore.session.get_session()


def _configured_bundle(session: Any) -> str | None:
    """Return the certificates that the AWS configuration names."""
    found = session.get_config_variable("ca_bundle")
    return None if found is None else str(found)


@functools.lru_cache
def _loader(data_path: str | None) -> Any:
    """Return what reads botocore's description of S3, a megabyte of JSON, once for all clients of the process."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _client(session: Any, endpoint_url: str | None, anonymous: bool, region: str | None) -> Any:
    """Return a client, whose methods botocore makes as it runs."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        signature_version=UNSIGNED if anonymous else "s3v4",
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALL_SECONDS,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",  # stores other than AWS refuse the newer ones
        response_checksum_validation="when_required",
    )
    try:
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        # AWS_REGION is what the other SDKs read; botocore knows AWS_DEFAULT_REGION and profiles.
        region = region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
        verify = ca_bundle(_configured_bundle(session))
        return session.create_client("s3", region_name=region, endpoint_url=endpoint_url, config=config, verify=verify)
    except (BotoCoreError, ValueError) as error:
        raise StorageError(
            f"s3: {next(iter(str(error).splitlines()), '')}",
            next_step="check --endpoint-url (for example https://s3.example.org), AWS_PROFILE and AWS_REGION",
        ) from None
