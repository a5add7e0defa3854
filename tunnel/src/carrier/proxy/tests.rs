use super::*;

/// The value of `Proxy-Authorization` for `ann:p@ss:w/rd%é #?`.
const HARD: &str = "Basic YW5uOnBAc3M6dy9yZCXDqSAjPw==";

fn environment(variables: &[(&'static str, &str)]) -> Result<Proxies, BadProxy> {
    Proxies::from_environment(|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| OsString::from(value))
    })
}

/// HOST:PORT of the proxy on the way there.
fn way(proxies: &Proxies, relay: &str) -> Option<String> {
    let way = proxies.way(&relay.parse().unwrap()).unwrap();
    way.map(|proxy| proxy.at())
}

#[test]
fn without_a_word_every_way_is_direct() {
    assert_eq!(way(&Proxies::none(), "https://relay.example"), None);
    assert_eq!(
        way(&environment(&[]).unwrap(), "https://relay.example"),
        None
    );
    let empty = environment(&[("HTTPS_PROXY", "")]).unwrap();
    assert_eq!(way(&empty, "https://relay.example"), None);
}

#[test]
fn the_environment_is_read_as_go_reads_it() {
    let both = [
        ("https_proxy", "http://lower:1"),
        ("HTTPS_PROXY", "http://upper:2"),
    ];
    let proxies = environment(&both).unwrap();
    assert_eq!(
        way(&proxies, "https://relay.example").as_deref(),
        Some("upper:2")
    );
    let proxies = environment(&both[..1]).unwrap();
    assert_eq!(
        way(&proxies, "https://relay.example").as_deref(),
        Some("lower:1")
    );
    // Never for loopback.
    for relay in [
        "https://localhost:8443",
        "https://127.1.2.3",
        "https://[::1]:1",
        "http://127.0.0.1:80",
    ] {
        assert_eq!(way(&proxies, relay), None, "{relay}");
    }
}

#[test]
fn exceptions_are_names_with_all_below_networks_and_single_ports() {
    let list = "one.example, .below.example,*.star.example,10.0.0.0/8,[fd00::1]:443,fd01::/16,ported.example:8443";
    let proxies = environment(&[("HTTPS_PROXY", "proxy:3128"), ("no_proxy", list)]).unwrap();
    for direct in [
        "https://one.example:99",
        "https://deep.one.example",
        "https://a.below.example",
        "https://a.star.example",
        "https://10.9.8.7",
        "https://[fd00::1]",
        "https://[fd01::2]",
        "https://ported.example:8443",
    ] {
        assert_eq!(way(&proxies, direct), None, "{direct}");
    }
    for through in [
        "https://none.example",
        "https://11.0.0.1",
        "https://[fd00::1]:8443",
        "https://ported.example",
    ] {
        assert_eq!(
            way(&proxies, through).as_deref(),
            Some("proxy:3128"),
            "{through}"
        );
    }
    let all = [("HTTPS_PROXY", "proxy:3128"), ("NO_PROXY", "a.example, *")];
    let all = environment(&all).unwrap();
    for direct in [
        "https://none.example",
        "https://11.0.0.1",
        "https://[fd00::1]",
    ] {
        assert_eq!(way(&all, direct), None, "{direct}");
    }
}

#[test]
fn a_proxy_that_was_configured_is_for_every_relay() {
    let proxies = Proxies::always("proxy.example", "--proxy").unwrap();
    for relay in [
        "https://relay.example",
        "https://127.0.0.1:8443",
        "http://localhost",
    ] {
        assert_eq!(way(&proxies, relay).as_deref(), Some("proxy.example:80"));
    }
    let proxies = Proxies::always("https://[fd00::9]", "--proxy").unwrap();
    let relay = "https://relay.example".parse().unwrap();
    let proxy = proxies.way(&relay).unwrap().unwrap();
    assert_eq!(
        (proxy.at().as_str(), proxy.host.as_str()),
        ("[fd00::9]:443", "fd00::9")
    );
    assert!(proxy.over_tls);
    // Trust is asked for where it is needed.
    assert_eq!(
        proxies.trusting(&relay, || Err("asked")).unwrap_err(),
        "asked"
    );
    let plain = Proxies::always("http://proxy", "--proxy").unwrap();
    assert!(plain.trusting(&relay, || Err("asked")).is_ok());
}

#[test]
fn any_password_is_carried_and_none_is_shown() {
    for url in [
        "http://ann:p%40ss%3Aw%2Frd%25%C3%A9%20%23%3F@proxy:3128",
        // What a URL allows bare may be bare.
        "ann:p%40ss:w%2Frd%25%C3%A9%20%23%3F@proxy:3128",
    ] {
        let proxies = Proxies::always(url, "--proxy").unwrap();
        let relay = "https://relay.example".parse().unwrap();
        let proxy = proxies.way(&relay).unwrap().unwrap();
        let credentials = proxy.credentials.unwrap();
        assert_eq!(credentials, HARD);
        assert!(credentials.is_sensitive());
        let shown = format!("{proxies:?}");
        assert!(shown.contains("proxy:3128"), "{shown}");
        assert!(!shown.contains("ann") && !shown.contains("p%40"), "{shown}");
    }
}

#[test]
fn what_cannot_be_used_names_its_variable_and_quotes_nothing() {
    for (url, part) in [
        ("socks5://proxy:1080", "SOCKS"),
        ("ftp://proxy", "http://"),
        ("http://", "URL"),
        ("http://ann:se/cret@proxy:3128", "percent-encoded"),
        ("http://ann:12/cret@proxy:3128", "percent-encoded"),
        ("http://ann:12#cret@proxy:3128", "percent-encoded"),
        ("http://ann:12?cret@proxy:3128", "percent-encoded"),
        ("http://ann:100%cret@proxy:3128", "%25"),
        ("http://ann:%E9cret@proxy:3128", "UTF-8"),
        ("http://ann:sécret@proxy:3128", "percent-encoded"),
        ("http://ann:se cret@proxy:3128", "percent-encoded"),
        ("http://an%3An:secret@proxy:3128", "colon"),
        ("http://proxy:99999", "port"),
        ("http://a proxy", "URL"),
    ] {
        let error = environment(&[("https_proxy", url)]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("https_proxy"), "{url}: {text}");
        assert!(text.contains(part), "{url}: {text}");
        assert!(!text.contains("cret"), "{url}: {text}");
        assert!(Proxies::always(url, "--proxy").is_err(), "{url}");
    }
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_text_is_an_error() {
    use std::os::unix::ffi::OsStringExt;
    let broken = |name| (name == "HTTPS_PROXY").then(|| OsString::from_vec(vec![0xff]));
    let error = Proxies::from_environment(broken).unwrap_err();
    assert_eq!(error.origin, "HTTPS_PROXY");
}
