"""The currencies of ISO 4217 and how many decimals each has."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal

_LISTED = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP
CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF
IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD
MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB
RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD
UYU UZS VED VES VND VUV WST XAF XCD XOF XPF YER ZAR ZMW
"""
_CODES = frozenset(_LISTED.split())
_WITHOUT = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
_OF_THREE = "BHD IQD JOD KWD LYD OMR TND"
_DECIMALS = dict.fromkeys(_WITHOUT.split(), 0) | dict.fromkeys(_OF_THREE.split(), 3)


def is_currency(code: str) -> bool:
    """Whether this is the code of a currency in use."""
    return code in _CODES


def rounded(amount: Decimal, currency: str) -> Decimal:
    """Rounds to the currency's smallest unit; a half goes to the even neighbour, so that many lines have no bias."""
    unit = Decimal(1).scaleb(-_DECIMALS.get(currency, 2))
    return amount.quantize(unit, ROUND_HALF_EVEN)
