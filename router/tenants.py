"""Who calls: the tenant whose API key a request carries."""

from collections.abc import Iterable, Sequence
from hmac import compare_digest

from protos.errors import Unauthenticated
from router.tenant import Tenant

_SCHEME = "bearer "  # compared in lower case


class Tenants:
    """All that a router serves. Where none are named everyone is the one tenant `alone`, and no key is asked for."""

    def __init__(self, named: Sequence[Tenant], alone: Tenant) -> None:
        self._named = tuple(named)
        self._alone = alone

    def identify(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Tenant:
        """The tenant of a call's metadata, `authorization: Bearer KEY`. Raises `Unauthenticated`.

        Every key is compared, each in constant time, so how long it takes tells nothing of them.
        """
        if not self._named:
            return self._alone
        given = _bearer(metadata or ()).encode()
        matching = [tenant for tenant in self._named if compare_digest(tenant.api_key.encode(), given)]
        if not matching:
            raise Unauthenticated(
                "this router answers its tenants only: send `authorization: Bearer KEY` with a tenant's API key",
                stage="admission",
            )
        return matching[0]


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for name, value in metadata:
        if name == "authorization" and isinstance(value, str) and value.lower().startswith(_SCHEME):
            return value[len(_SCHEME) :].strip()
    return ""
