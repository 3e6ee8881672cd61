"""Every call of the API, with the client that openapi-python-client made of the document."""

from __future__ import annotations

import json
import sys

from gatehouse_client import AuthenticatedClient
from gatehouse_client.api.health import get_health, get_live, get_metrics, get_ready
from gatehouse_client.api.users import (
    create_user,
    delete_user,
    get_user,
    list_users,
    patch_user,
    put_user,
)
from gatehouse_client.models import NewUser, UserChange, WholeUser

base_url, token = sys.argv[1:]
client = AuthenticatedClient(base_url=base_url, token=token)
id = "01936f3e-0000-7000-8000-000000000009"
said: list[object] = []

ann = NewUser(email="ann@example.com", name="Ann")
created = create_user.sync_detailed(client=client, body=ann)
said += [created.status_code, created.parsed.name]
taken = create_user.sync_detailed(client=client, body=ann)
said += [taken.status_code, taken.parsed.type_]

bob = WholeUser.from_dict({"email": "bob@example.com", "name": "Bob", "metadata": {"plan": "pro"}})
put = put_user.sync_detailed(id, client=client, body=bob, if_none_match="*")
said += [put.status_code, put.parsed.email]
version = put.headers["ETag"]
robert, bert = UserChange(name="Robert"), UserChange(name="Bert")
patched = patch_user.sync_detailed(id, client=client, body=robert, if_match=version)
said += [patched.status_code, patched.parsed.name]
late = patch_user.sync_detailed(id, client=client, body=bert, if_match=version)
said += [late.status_code, late.parsed.title]
got = get_user.sync_detailed(id, client=client)
said += [got.status_code, got.parsed.metadata["plan"]]
page = list_users.sync_detailed(client=client, limit=1, count=True)
said += [page.status_code, len(page.parsed.users), page.parsed.total]

# It makes no calls with bodies or answers of text/csv: these go through its own httpx client.
http = client.get_httpx_client()
imported = http.post(
    "/users", content="email,name\neve@example.com,Eve\n", headers={"Content-Type": "text/csv"}
)
said += [imported.status_code, '"created": 1' in imported.text]
exported = http.get("/users", headers={"Accept": "text/csv"})
said += [exported.status_code, len(exported.text.splitlines())]

said += [delete_user.sync_detailed(id, client=client).status_code]
said += [get_health.sync(client=client).database.status]
said += [get_live.sync(client=client).status, get_ready.sync(client=client).status]
said += ["gatehouse_requests_total" in get_metrics.sync(client=client)]
print(json.dumps(said))
