import torch

from modmeta.data.digits import STYLES, DigitsDomains


def test_every_digit_is_in_one_domain(digits: DigitsDomains) -> None:
    assert digits.domains == tuple(sorted(STYLES))
    assert digits.classes == tuple("0123456789")
    rows = torch.cat([torch.from_numpy(digits.ids(d, c)) for d in digits.domains for c in digits.classes])
    assert sorted(rows.tolist()) == list(range(1797))


def test_domains_are_balanced(digits: DigitsDomains) -> None:
    counts = [len(digits.ids(domain, name)) for domain in digits.domains for name in digits.classes]
    assert min(counts) >= 24
    assert max(counts) <= 27


def test_images_are_the_same_every_time(digits: DigitsDomains) -> None:
    again = DigitsDomains()
    assert again.key == digits.key
    assert torch.equal(again.load(range(1797)), digits.load(range(1797)))


def test_other_sizes() -> None:
    store = DigitsDomains(48)
    assert store.load([0, 5]).shape == (2, 3, 48, 48)
    assert store.key != DigitsDomains().key


def test_styles_keep_the_digit_readable(digits: DigitsDomains) -> None:
    """Within each style the nearest mean of the other half of the images is mostly the right digit."""
    for domain in digits.domains:
        halves = [[digits.ids(domain, name)[half::2] for name in digits.classes] for half in (0, 1)]
        # The brightest channel: the neon tubes vary in colour, which is no part of their shape.
        seen = [[digits.load(rows).amax(1).float().flatten(1) for rows in half] for half in halves]
        means = torch.stack([images.mean(0) for images in seen[0]])
        right = [(torch.cdist(images, means).argmin(1) == label).float().mean() for label, images in enumerate(seen[1])]
        assert torch.stack(right).mean() > 0.75, domain


def test_styles_differ(digits: DigitsDomains) -> None:
    def looks(domain: str) -> torch.Tensor:
        rows = [row for name in digits.classes for row in digits.ids(domain, name)]
        images = digits.load(rows).float() / 255
        return torch.cat([images.mean((0, 2, 3)), images.std((2, 3)).mean(0), images.diff(dim=3).abs().mean((0, 2, 3))])

    looks_of = torch.stack([looks(domain) for domain in digits.domains])
    distances = torch.cdist(looks_of, looks_of) + torch.eye(len(looks_of))
    assert distances.min() > 0.2
