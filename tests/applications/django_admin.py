"""Django's admin: a browser logs in, adds a user and logs out. Django compares Origin with Host."""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any

from program import run


def configure() -> None:
    import django
    from django.conf import settings

    settings.configure(
        SECRET_KEY="for tests",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="django_admin",
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "django.sqlite"}},
        INSTALLED_APPS=[
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "django.contrib.messages",
        ],
        MIDDLEWARE=[
            "django.middleware.security.SecurityMiddleware",
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        STATIC_URL="/static/",
        # The quickest there is: how passwords are kept is not what is tried.
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    )
    django.setup()


def serve(port: int) -> None:
    configure()
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    get_user_model().objects.create_superuser("admin", "admin@example.com", "a long password")
    folder = str(Path(__file__).parent)
    gunicorn = [sys.executable, "-m", "gunicorn", "--threads=4", "--pythonpath", folder]
    os.execv(sys.executable, [*gunicorn, f"--bind=127.0.0.1:{port}", "django_admin:application()"])


def application() -> Any:
    """What gunicorn serves."""
    configure()
    from django.contrib import admin
    from django.core.wsgi import get_wsgi_application
    from django.urls import path

    global urlpatterns
    urlpatterns = [path("admin/", admin.site.urls)]
    return get_wsgi_application()


def use(base: str) -> Any:
    import httpx

    token = r'name="csrfmiddlewaretoken" value="([^"]+)"'
    with httpx.Client(base_url=base, timeout=30) as browser:
        entry = browser.get("/admin/")
        page = browser.get(entry.headers["location"])

        def submit(path: str, **fields: str) -> httpx.Response:
            """Send a form as a browser does: with where it comes from."""
            where = {"Origin": base, "Referer": f"{base}{path}"}
            form = re.findall(token, browser.get(path).text)
            fields["csrfmiddlewaretoken"] = form[0]
            return browser.post(path, data=fields, headers=where)

        credentials = {"username": "admin", "password": "a long password"}
        login = submit("/admin/login/?next=/admin/", **credentials)
        home = browser.get(login.headers["location"])
        name = f"visitor-{secrets.token_hex(4)}"
        passwords = {"password1": "another long password", "password2": "another long password"}
        added = submit("/admin/auth/user/add/", username=name, usable_password="true", **passwords)
        listed = browser.get("/admin/auth/user/")
        forged = browser.post("/admin/auth/user/add/", headers={"Origin": "http://evil.example"})
        return {
            "entry": [entry.status_code, entry.headers["location"]],
            "page": [page.status_code, "Log in" in page.text],
            "login": [login.status_code, login.headers["location"]],
            "cookies": sorted(browser.cookies.keys()),
            "home": [home.status_code, "Site administration" in home.text],
            "added": [added.status_code, re.sub(r"\d+", "ID", added.headers["location"])],
            "listed": [listed.status_code, name in listed.text],
            "forged": forged.status_code,
        }


if __name__ == "__main__":
    run(serve, use)
