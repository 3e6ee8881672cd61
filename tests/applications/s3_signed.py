"""S3: boto3 signs each request with the host that it calls, and moto checks the signature."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.config import Config
from botocore.exceptions import ClientError
from program import run

# What the client does before it has a key of its own: a user, what they may do, and the key.
UNSIGNED = 3
POLICY = {
    "Version": "2012-10-17",
    "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"},
}


def serve(port: int) -> None:
    os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = str(UNSIGNED)
    # The module, for the script's own first line names the Python that it was installed with.
    start = "from moto.server import main; main()"
    command = [sys.executable, "-c", start, "-H", "127.0.0.1", "-p", str(port)]
    os.execv(sys.executable, command)


def use(base: str) -> Any:
    httpx.post(f"{base}/moto-api/reset").raise_for_status()
    httpx.post(f"{base}/moto-api/reset-auth", content=str(UNSIGNED)).raise_for_status()

    def client(service: str, key: str, secret: str, **config: Any) -> Any:
        return boto3.client(
            service,
            endpoint_url=base,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, **config),
        )

    iam = client("iam", "nobody", "nothing")
    iam.create_user(UserName="ann")
    iam.put_user_policy(UserName="ann", PolicyName="all", PolicyDocument=json.dumps(POLICY))
    key = iam.create_access_key(UserName="ann")["AccessKey"]
    s3 = client("s3", key["AccessKeyId"], key["SecretAccessKey"], s3={"addressing_style": "path"})
    s3.create_bucket(Bucket="shop")
    name = "a folder/naïve +%&=~ name.txt"
    s3.put_object(Bucket="shop", Key=name, Body=b"hello", Metadata={"who": "ann"})
    small = s3.get_object(Bucket="shop", Key=name)
    data = os.urandom(1 << 20) * 12
    Path("large.bin").write_bytes(data)
    s3.upload_file("large.bin", "shop", "large.bin")  # in parts, several at once
    s3.download_file("shop", "large.bin", "again.bin")
    again = Path("again.bin").read_bytes()
    part = s3.get_object(Bucket="shop", Key="large.bin", Range="bytes=1000-1999")
    listed = s3.list_objects_v2(Bucket="shop")["Contents"]

    def refused(secret: str) -> Any:
        stranger = client("s3", key["AccessKeyId"], secret, s3={"addressing_style": "path"})
        try:
            stranger.get_object(Bucket="shop", Key=name)
        except ClientError as error:
            return error.response["Error"]["Code"]
        return "let in"

    return {
        "small": [small["Body"].read().decode(), small["Metadata"], small["ETag"]],
        "large": [len(again), hashlib.sha256(again).digest() == hashlib.sha256(data).digest()],
        "part": part["Body"].read() == data[1000:2000],
        "listed": [one["Key"] for one in listed],
        "wrong secret": refused("wrong"),
    }


if __name__ == "__main__":
    run(serve, use)
