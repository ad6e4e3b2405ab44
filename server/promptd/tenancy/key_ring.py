"""Who stands behind a key: the static ones of the environment, then the issued ones of the store."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping

from promptd.errors import AuthenticationError
from promptd.tenancy.api_keys import ApiKey, parse_key
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.scopes import TENANT_SCOPES, Principal, Scope
from promptd.tenancy.tenant import Tenant

STATIC_KEY_ID = "static"
ADMIN_KEY_ID = "static-admin"
OPEN_KEY_ID = "open"


class KeyRing:
    """Authenticates. Without any key, static or issued, every caller is the default tenant with all scopes."""

    def __init__(
        self,
        tenant_keys: Mapping[str, str],
        admin_key: str | None,
        default_tenant: str,
        *,
        key_secret: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._static = [
            (key.encode(), Principal(tenant, TENANT_SCOPES, STATIC_KEY_ID)) for key, tenant in tenant_keys.items()
        ]
        if admin_key is not None:
            admin = Principal(default_tenant, TENANT_SCOPES | {Scope.ADMIN}, ADMIN_KEY_ID)
            self._static.append((admin_key.encode(), admin))
        self._open = Principal(default_tenant, frozenset(Scope), OPEN_KEY_ID)
        self.is_open = not self._static
        self._key_secret = key_secret
        self._directory: TenantDirectory | None = None
        self._clock = clock

    async def connect(self, directory: TenantDirectory) -> None:
        """Know the issued keys too; where there are any, nobody comes in without one."""
        self._directory = directory
        if self._key_secret is None:
            self._key_secret = await directory.book.key_secret()
        self.is_open = self.is_open and not await directory.book.has_keys()

    @property
    def key_secret(self) -> bytes:
        """What keys are hashed under."""
        if self._key_secret is None:
            raise RuntimeError("the key ring is not connected to a store yet")
        return self._key_secret

    async def authenticate(self, authorization: str | None) -> Principal:
        """Return the caller behind `Authorization: Bearer KEY`; raises `AuthenticationError`."""
        if self.is_open:
            return self._open
        given = _bearer(authorization)
        if not given:
            raise AuthenticationError("no API key: send it as 'Authorization: Bearer KEY'", code="missing_api_key")
        found = self._static_holder(given) or await self._issued(given)
        if found is None:
            raise AuthenticationError("this API key is not known")
        return found

    def known(self, authorization: str | None) -> Principal | None:
        """Return whom `authenticate` would, where that is certain without a look into the store; None tells nothing."""
        if self.is_open:
            return self._open
        given = _bearer(authorization)
        found, key = self._static_holder(given), parse_key(given)
        if found is not None or key is None or self._directory is None:
            return found
        owner = self._directory.known_owner(key.id)
        tenant = None if owner is None else self._directory.known(owner)
        return None if tenant is None else self._holder(tenant, key)

    def _static_holder(self, given: str) -> Principal | None:
        found = None
        for key, principal in self._static:  # every key is compared, so that time tells nothing
            if hmac.compare_digest(key, given.encode()):
                found = principal
        return found

    async def _issued(self, given: str) -> Principal | None:
        """Look an issued key up; unknown, ended and foreign ones are all None."""
        key, directory = parse_key(given), self._directory
        if key is None or directory is None:
            return None
        owner = await directory.owner_of(key.id)
        return None if owner is None else self._holder(await directory.tenant(owner), key)

    def _holder(self, tenant: Tenant, key: ApiKey) -> Principal | None:
        record = tenant.key(key.id)
        if record is None or not hmac.compare_digest(record.digest, key.digest(self.key_secret)):
            return None
        return Principal(tenant.name, frozenset(record.scopes), key.id) if record.is_active(self._clock()) else None


def _bearer(authorization: str | None) -> str:
    """Return the key of `Bearer KEY`; empty where there is none."""
    scheme, _, given = (authorization or "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""
