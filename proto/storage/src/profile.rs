//! The files in which the tools of AWS keep credentials: `~/.aws/credentials` and `~/.aws/config`.
//!
//! What the environment says wins. Profiles that need another program or a login (`credential_process`, `sso_*`,
//! `role_arn`) are not followed; `aws configure export-credentials --format env` turns them into variables.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use configparser::ini::Ini;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as Key};

const FROM_CREDENTIALS: [(&str, Key); 3] = [
    ("aws_access_key_id", Key::AccessKeyId),
    ("aws_secret_access_key", Key::SecretAccessKey),
    ("aws_session_token", Key::Token),
];
const FROM_CONFIG: [(&str, Key); 2] = [("region", Key::DefaultRegion), ("endpoint_url", Key::Endpoint)];

/// Fills in what the environment has left open.
pub(super) fn fill(builder: AmazonS3Builder) -> Result<AmazonS3Builder, String> {
    let file = |variable: &str, name: &str| {
        let named = std::env::var_os(variable).map(PathBuf::from);
        named.or_else(|| Some(std::env::home_dir()?.join(".aws").join(name)))
    };
    let profile = std::env::var("AWS_PROFILE").ok();
    from_files(
        builder,
        profile.as_deref(),
        file("AWS_SHARED_CREDENTIALS_FILE", "credentials").as_deref(),
        file("AWS_CONFIG_FILE", "config").as_deref(),
    )
}

fn from_files(
    mut builder: AmazonS3Builder,
    profile: Option<&str>,
    credentials: Option<&Path>,
    config: Option<&Path>,
) -> Result<AmazonS3Builder, String> {
    let name = profile.unwrap_or("default");
    let has_credentials = [Key::AccessKeyId, Key::WebIdentityTokenFile, Key::ContainerCredentialsRelativeUri]
        .iter()
        .any(|key| builder.get_config_value(key).is_some());
    let mut found = false;
    if !has_credentials && let Some(section) = section(credentials, name)? {
        found = true;
        for (key, config) in FROM_CREDENTIALS {
            if let Some(Some(value)) = section.get(key) {
                builder = builder.with_config(config, value);
            }
        }
    }
    // Only this file names profiles other than the default one like this.
    let in_config = if name == "default" { name.to_owned() } else { format!("profile {name}") };
    if let Some(section) = section(config, &in_config)? {
        found = true;
        for (key, config) in FROM_CONFIG {
            if builder.get_config_value(&config).is_none()
                && let Some(Some(value)) = section.get(key)
            {
                builder = builder.with_config(config, value);
            }
        }
    }
    match profile {
        Some(profile) if !found && !has_credentials => Err(format!(
            "AWS_PROFILE is {profile:?}, and neither ~/.aws/credentials nor ~/.aws/config has that profile; correct it"
        )),
        _ => Ok(builder),
    }
}

/// A section of a file; none where the file or the section is not there.
fn section(file: Option<&Path>, name: &str) -> Result<Option<Section>, String> {
    let Some(file) = file.filter(|file| file.is_file()) else { return Ok(None) };
    let mut ini = Ini::new_cs();
    // A secret may hold any character.
    ini.set_inline_comment_symbols(Some(&[]));
    // The message of the parser could quote a line with a secret.
    let mut sections =
        ini.load(file).map_err(|_| format!("{} cannot be read; correct it", file.display()))?;
    Ok(sections.remove(name))
}

/// Values by their keys.
type Section = HashMap<String, Option<String>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_fills_in_what_the_environment_leaves_open() {
        let folder = tempfile::tempdir().unwrap();
        let (credentials, config) = (folder.path().join("credentials"), folder.path().join("config"));
        std::fs::write(
            &credentials,
            "[default]\naws_access_key_id = first\naws_secret_access_key = s1\n\n[lab]\naws_access_key_id=second\naws_secret_access_key=a/b+c=\n",
        )
        .unwrap();
        std::fs::write(&config, "[profile lab]\nregion = eu-west-3\nendpoint_url = http://127.0.0.1:9\n")
            .unwrap();
        let fill = |builder, profile| from_files(builder, profile, Some(&credentials), Some(&config));
        let value = |builder: &AmazonS3Builder, key| builder.get_config_value(&key);

        let default = fill(AmazonS3Builder::new(), None).unwrap();
        assert_eq!(value(&default, Key::AccessKeyId).as_deref(), Some("first"));
        assert_eq!(value(&default, Key::Endpoint), None);

        let lab = fill(AmazonS3Builder::new().with_region("here"), Some("lab")).unwrap();
        assert_eq!(value(&lab, Key::SecretAccessKey).as_deref(), Some("a/b+c="));
        assert_eq!(value(&lab, Key::Region).as_deref(), Some("here"));
        assert_eq!(value(&lab, Key::Endpoint).as_deref(), Some("http://127.0.0.1:9"));

        let known = fill(AmazonS3Builder::new().with_access_key_id("mine"), None).unwrap();
        assert_eq!(value(&known, Key::AccessKeyId).as_deref(), Some("mine"));
        assert_eq!(value(&known, Key::SecretAccessKey), None);

        let message = fill(AmazonS3Builder::new(), Some("other")).unwrap_err();
        assert!(message.contains("\"other\"") && !message.contains("first"), "{message}");
    }
}
