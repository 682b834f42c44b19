"""Writes the software bill of materials of each image, as CycloneDX 1.6 JSON: Debian's packages and Python's.

The content of an image decides, not a lock file: `dpkg`'s status and the metadata of every installed distribution.
"""

from __future__ import annotations

import email.parser
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from cluster.errors import ClusterError
from cluster.say import say
from images import buildah, registry
from images.build import Image

PACKAGES_OF_DEBIAN = "var/lib/dpkg/status"
PACKAGES_OF_PYTHON = "opt/lorapool/lib/python3*/site-packages"


def write(images: list[Image], folder: Path) -> list[Path]:
    """Writes <folder>/<image>.cdx.json for images that are built. Raises ClusterError."""
    folder.mkdir(parents=True, exist_ok=True)
    with registry.serving() as where, buildah.exclusive():
        return [_write(image, where, folder) for image in images]


def _write(image: Image, where: str, folder: Path) -> Path:
    if registry.manifest(where, image.repository, image.key()) is None:
        raise ClusterError(f"{image.repository} is not built", remedy="`make images`")
    reference = f"docker://{where}/{image.repository}:{image.key()}"
    container = buildah.run("from", "--quiet", "--tls-verify=false", reference, quiet=True).strip()
    try:
        root = Path(buildah.run("mount", container, quiet=True).strip())
        path = folder / f"{image.repository}.cdx.json"
        path.write_text(document(root, image.repository, image.key()))
    finally:
        buildah.run("rm", container, quiet=True)
    say(f"{image.repository}: {path}")
    return path


def document(root: Path, name: str, version: str) -> str:
    """The document of an unpacked image. Equal images give equal documents, but for their time."""
    image = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref=name)
    components = [*_debian(root / PACKAGES_OF_DEBIAN), *_python(root)]
    bom = Bom(
        components=components,
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{name}:{version}"),
        metadata=BomMetaData(component=image, timestamp=datetime.now(UTC)),
    )
    bom.register_dependency(image, components)
    return f"{JsonV1Dot6(bom).output_as_string(indent=2)}\n"


def _debian(status: Path) -> Iterator[Component]:
    parser = email.parser.Parser()
    for paragraph in status.read_text(encoding="utf-8").split("\n\n"):
        fields = parser.parsestr(paragraph, headersonly=True)
        if (fields["Status"] or "").endswith(" installed"):
            qualifiers = {"arch": fields["Architecture"]}
            yield _component(PackageURL("deb", "debian", fields["Package"], fields["Version"], qualifiers))


def _python(root: Path) -> Iterator[Component]:
    for folder in root.glob(PACKAGES_OF_PYTHON):
        for distribution in distributions(path=[str(folder)]):
            metadata = distribution.metadata.json
            name = str(metadata["name"]).lower().replace("_", "-")
            license_expression = metadata.get("license_expression")
            yield _component(
                PackageURL("pypi", None, name, distribution.version),
                license_expression if isinstance(license_expression, str) else None,
            )


def _component(package: PackageURL, license_expression: str | None = None) -> Component:
    licenses = [LicenseFactory().make_from_string(license_expression)] if license_expression else []
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        purl=package,
        bom_ref=package.to_string(),
        licenses=licenses,
    )
